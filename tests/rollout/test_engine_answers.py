"""An answer of vLLM that contradicts itself is refused as a request, whatever is wrong with it.

The client in front of vLLM is replaced by one that gives a right answer with one thing changed: a healthy vLLM does not
give these.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sif_ray.config import EngineConfig, PromptConfig, SamplingConfig
from sif_ray.policy.processor import PolicyProcessor
from sif_ray.records import RolloutGroup
from sif_ray.rollout.engine import RolloutEngine, RolloutRequest
from sif_ray.rollout.errors import RolloutRequestError
from sif_ray.rollout.vllm_client import Completion
from sif_ray.toyworld.assets import path
from sif_ray.toyworld.render import png, render
from sif_ray.toyworld.scenes import make_scene

MODEL = str(path("tiny_policy"))
IMAGES = tuple(png(render(make_scene(seed)).rgb) for seed in (0, 1))
GOOD = Completion(np.array([40, 41, 42], np.int32), np.full(3, -1.0, np.float32), ((0, 3),), "length")

Answer = tuple[list[int], list[Completion]]


@pytest.fixture(scope="module")
def processor() -> PolicyProcessor:
    return PolicyProcessor(MODEL)


def _generate(
    processor: PolicyProcessor, damage: Callable[[Answer], Answer], images: tuple[bytes, ...] = IMAGES
) -> RolloutGroup:
    class DamagedClient:
        async def generate(self, *arguments: Any, **options: Any) -> Answer:
            encoded = processor.encode_prompt("Which is closer?", images, PromptConfig())
            return damage((encoded.token_ids_P, [GOOD, GOOD]))

    engine = RolloutEngine(MODEL, EngineConfig(), PromptConfig())
    engine._client, engine._processor = DamagedClient(), processor  # type: ignore[assignment]
    request = RolloutRequest("ticket", "toy-7", "Which is closer?", images, 2, SamplingConfig())
    return asyncio.run(engine.generate(request))


def _completions(**changes: Any) -> Callable[[Answer], Answer]:
    return lambda answer: (answer[0], [GOOD, replace(GOOD, **changes)])


def test_an_answer_in_order_becomes_a_group(processor: PolicyProcessor) -> None:
    group = _generate(processor, lambda answer: answer)
    assert (len(group.rollouts), group.num_tokens) == (2, 6)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda answer: (answer[0][1:], answer[1]), "is not what the policy's processor made"),
        (_completions(logprobs_T=np.array([-1.0, np.nan, -1.0], np.float32)), r"logprobs_T\[1\] = nan"),
        (_completions(logprobs_T=np.full(2, -1.0, np.float32)), "one log-prob for each"),
        (_completions(version_spans=((0, 2),)), "cover 2 of 3 tokens"),
        (_completions(finish_reason="abort"), "finish_reason = 'abort'"),
        (lambda answer: (answer[0], []), "0 rollouts"),
    ],
)
def test_an_answer_that_contradicts_itself_is_a_refused_request(
    processor: PolicyProcessor, damage: Callable[[Answer], Answer], message: str
) -> None:
    with pytest.raises(RolloutRequestError, match=f"sample toy-7: .*{message}"):
        _generate(processor, damage)


def test_image_tokens_that_do_not_fit_the_images_are_refused(processor: PolicyProcessor) -> None:
    token = processor.image_token_id

    def one_more(answer: Answer) -> Answer:
        first = answer[0].index(token)
        return [*answer[0][:first], token, *answer[0][first:]], answer[1]

    with pytest.raises(RolloutRequestError, match="sample toy-7: the prompt has runs of"):
        _generate(processor, one_more)
    with pytest.raises(RolloutRequestError, match="holds an image placeholder"):
        _generate(processor, _completions(token_ids_T=np.array([40, token, 42], np.int32)))


def test_an_unreadable_image_is_refused_before_the_engine_is_asked(processor: PolicyProcessor) -> None:
    with pytest.raises(RolloutRequestError, match=r"sample toy-7: image of 9 bytes cannot be decoded"):
        _generate(processor, lambda answer: answer, images=(b"no image!", IMAGES[1]))
