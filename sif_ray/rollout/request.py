"""What a rollout engine is asked for. Its own module, because those who ask need no torch, transformers or vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sif_ray.config import SamplingConfig

if TYPE_CHECKING:
    from sif_ray.policy.processor import Message


@dataclass(frozen=True)
class RolloutRequest:
    """One prompt to be answered `num_rollouts` times.

    Example: `RolloutRequest("epoch0-toy-7", "toy-7", "Which is closer, ...?", (rgb_png, depth_png), 8,
    SamplingConfig(temperature=1.0, max_tokens=96))`.
    """

    ticket_id: str
    sample_id: str
    question: str
    images: tuple[bytes, ...]  # encoded: (rgb,) or (rgb, depth), as the engine's PromptConfig says
    num_rollouts: int
    sampling: SamplingConfig
    seed: int | None = None  # None = the engine's own stream; equal seeds repeat a group only in an equal batch
    messages: tuple[Message, ...] = ()  # a chat in place of the engine's prompt for the question
    adapter: str = ""  # one of the engine's adapters; "" = the policy itself
    urgent: bool = False  # the engine's next free place is for this one: others wait for the answer
