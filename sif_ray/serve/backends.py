"""What a service asks: a depth model, and a policy that writes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from sif_ray.config import SamplingConfig


@dataclass(frozen=True)
class Ask:
    """What the policy is asked: a question in the prompt of its training, or a chat as it stands.

    Example: `Ask((rgb_png, depth_png), SamplingConfig(temperature=0.0), question="Which is closer, ...?")`.
    """

    images: tuple[bytes, ...]  # encoded, in order of their places in the prompt
    sampling: SamplingConfig
    question: str = ""
    messages: tuple[dict[str, Any], ...] = ()  # instead of `question`; see `sif_ray.policy.processor.Message`
    seed: int | None = None
    adapter: str = ""  # "" = the policy itself


@dataclass(frozen=True)
class Generation:
    """What the policy wrote: all of it, or as a stream what it has added."""

    text: str
    policy_version: int
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    finish_reason: str | None = "stop"  # "stop" or "length"; None = more follows
    engine_s: float | None = None  # that the engine took for the whole output, measured beside it


@dataclass(frozen=True)
class Refused:
    """A request that the policy cannot take, say for its length."""

    message: str


EstimateDepth = Callable[[bytes], Awaitable[bytes]]
"""Encoded photograph to its depth in pseudo-colours, as `sif_ray.depth.encoding.depth_png` encodes it."""


class Policy(Protocol):
    """Writes outputs. A refusal is a value, because an error would come back wrapped in a remote one."""

    def generate(self, ask: Ask) -> Awaitable[Generation | Refused]: ...

    def stream(self, ask: Ask) -> AsyncGenerator[Generation | Refused]: ...
