"""One real engine in its actor, against Hugging Face forward passes of the same weights.

The reference sees a whole prompt and completion at once with the plain model, the engine makes it token by token: equal
log-probs say that prompt, images, sampling, caches and weights are what the rollout claims.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from sif_ray.config import EngineConfig, PromptConfig, SamplingConfig
from sif_ray.policy.processor import PolicyProcessor
from sif_ray.records import FloatArray, Rollout, RolloutGroup
from sif_ray.rollout.actor import RolloutActor
from sif_ray.rollout.engine import RolloutRequest
from sif_ray.rollout.errors import EngineDiedError, RolloutRequestError, WeightSyncError
from sif_ray.rollout.weights import Receipt, WeightUpdate, make_update
from sif_ray.toyworld.assets import path

MODEL = str(path("tiny_policy"))
CONFIG = EngineConfig(max_model_len=640, max_num_seqs=16, kv_cache_gib=1.0)
LOGPROB_TOLERANCE = 1e-3
FIRST_VERSION = 3


def _picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).resize((112, 112)).save(encoded, format="PNG")
    return encoded.getvalue()


def _request(name: str, num_rollouts: int = 1, **sampling: Any) -> RolloutRequest:
    pictures = (_picture(len(name)), _picture(1000 + len(name)))
    return RolloutRequest(name, name, "Which is closer?", pictures, num_rollouts, SamplingConfig(**sampling))


class Reference:
    """Log-probs by one plain forward pass of Hugging Face's model."""

    def __init__(self, noise: float) -> None:
        """Weights of the checkpoint plus `noise` times the spread of each tensor; 0 = the checkpoint itself."""
        torch.manual_seed(0)
        self._model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter += noise * parameter.std(correction=0) * torch.randn_like(parameter)
        self._processor = PolicyProcessor(MODEL)

    def update(self, version: int) -> WeightUpdate:
        """All weights as the learner publishes them, in several buckets of the object store."""
        named = list(self._model.named_parameters())
        return make_update(version, [named[start : start + 30] for start in range(0, len(named), 30)], put=ray.put)

    @torch.no_grad()
    def logits(self, group: RolloutGroup, rollout: Rollout) -> torch.Tensor:
        """(T, vocabulary) logits from which the T tokens of a rollout were drawn."""
        prompt = torch.tensor(group.prompt_token_ids_P).long()
        input_ids = torch.cat([prompt, torch.tensor(rollout.token_ids_T).long()])[None]
        features = self._processor.image_features(group.images)
        output = self._model(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            mm_token_type_ids=(input_ids == self._processor.image_token_id).int(),
            pixel_values=torch.from_numpy(features["pixel_values"]),
            image_grid_thw=torch.from_numpy(np.asarray(features["image_grid_thw"])),
        )
        logits = output.logits[0, len(prompt) - 1 : -1]
        logits[:, self._processor.image_token_id] = -torch.inf  # never sampled
        return logits

    def logprobs(self, group: RolloutGroup, rollout: Rollout, temperature: float = 1.0) -> FloatArray:
        """(T,) log-probs of a rollout's tokens."""
        logprobs = torch.log_softmax(self.logits(group, rollout) / temperature, dim=-1)
        return logprobs[torch.arange(len(logprobs)), torch.tensor(rollout.token_ids_T).long()].numpy()


@pytest.fixture(scope="module")
def actor(ray_local: None) -> Iterator[Any]:
    handle = RolloutActor.options(num_cpus=1).remote(MODEL, CONFIG, PromptConfig(), version=FIRST_VERSION)
    ray.get(handle.start.remote())
    yield handle
    ray.kill(handle)


@pytest.fixture(scope="module")
def old() -> Reference:
    return Reference(noise=0.0)


@pytest.fixture(scope="module")
def new() -> Reference:
    return Reference(noise=0.5)


def _generate(actor: Any, request: RolloutRequest) -> RolloutGroup:
    return ray.get(actor.generate.remote(request))


def _damaged(update: WeightUpdate) -> WeightUpdate:
    bucket = ray.get(update.buckets[1]).copy()
    spec = next(spec for spec in update.tensors if spec.bucket == 1)
    bucket[spec.offset_bytes + spec.num_bytes // 2] ^= 1
    return replace(update, buckets=(update.buckets[0], ray.put(bucket), *update.buckets[2:]))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_behaviour_logprobs_are_those_of_the_policy(actor: Any, old: Reference, temperature: float) -> None:
    group = _generate(actor, _request("group", 4, temperature=temperature, max_tokens=40))
    assert len(group.rollouts) == 4
    assert len({rollout.token_ids_T.tobytes() for rollout in group.rollouts}) > 1
    for rollout in group.rollouts:
        assert rollout.version_spans == ((FIRST_VERSION, len(rollout.token_ids_T)),)
        assert rollout.finish_reason in ("stop", "length")
        np.testing.assert_allclose(
            rollout.logprobs_T, old.logprobs(group, rollout, temperature), atol=LOGPROB_TOLERANCE
        )


def test_a_greedy_rollout_is_the_most_likely_one(actor: Any, old: Reference) -> None:
    group = _generate(actor, _request("greedy", temperature=0.0, max_tokens=40))
    (rollout,) = group.rollouts
    np.testing.assert_array_equal(rollout.token_ids_T, old.logits(group, rollout).argmax(-1))
    np.testing.assert_allclose(rollout.logprobs_T, old.logprobs(group, rollout), atol=LOGPROB_TOLERANCE)


def test_equal_greedy_rollouts_are_refused_with_the_way_out(actor: Any) -> None:
    with pytest.raises(RolloutRequestError, match="num_rollouts = 4 with temperature 0"):
        _generate(actor, _request("greedy", 4, temperature=0.0))


def test_a_prompt_without_room_for_an_answer_is_refused(actor: Any) -> None:
    request = replace(_request("long"), question="closer " * CONFIG.max_model_len)
    with pytest.raises(RolloutRequestError, match=r"max_model_len = 640; raise it"):
        _generate(actor, request)


def test_a_damaged_update_changes_nothing(actor: Any, old: Reference, new: Reference) -> None:
    update = new.update(FIRST_VERSION + 1)
    damaged = next(spec.name for spec in update.tensors if spec.bucket == 1)
    with pytest.raises(WeightSyncError, match=f"{damaged}: checksum"):
        ray.get(actor.update_weights.remote(_damaged(update)))
    skipped = update.tensors[-1].name
    with pytest.raises(WeightSyncError, match=f"{skipped}: missing"):
        ray.get(actor.update_weights.remote(replace(update, tensors=update.tensors[:-1])))
    assert ray.get(actor.version.remote()) == FIRST_VERSION
    group = _generate(actor, _request("damaged", 2, max_tokens=20))
    for rollout in group.rollouts:
        assert rollout.version_spans == ((FIRST_VERSION, len(rollout.token_ids_T)),)
        np.testing.assert_allclose(rollout.logprobs_T, old.logprobs(group, rollout), atol=LOGPROB_TOLERANCE)


def test_an_update_in_mid_generation_is_exact_to_the_token(actor: Any, old: Reference, new: Reference) -> None:
    temperature = 2.0  # flat: few rollouts end early
    update = new.update(FIRST_VERSION + 1)

    async def generate_and_update() -> tuple[list[RolloutGroup], Receipt]:
        ready = asyncio.ensure_future(
            _of(actor.generate.remote(_request("ready", 2, temperature=temperature, max_tokens=4)))
        )
        requests = [_request("long" * n, 8, temperature=temperature, max_tokens=500) for n in range(1, 4)]
        groups = [asyncio.ensure_future(_of(actor.generate.remote(request))) for request in requests]
        await ready  # the others share its batch, a hundred times longer
        receipt = await actor.update_weights.remote(update)
        return [await group for group in groups], receipt

    groups, receipt = asyncio.run(generate_and_update())
    assert (receipt.version, receipt.num_tensors) == (FIRST_VERSION + 1, len(update.tensors))
    assert (receipt.checksum, receipt.num_bytes) == (update.checksum, update.num_bytes)
    assert ray.get(actor.version.remote()) == FIRST_VERSION + 1

    split = [(group, item) for group in groups for item in group.rollouts if len(item.version_spans) == 2]
    assert split
    for group, rollout in split:
        (first, boundary), (second, after) = rollout.version_spans
        assert (first, second, boundary + after) == (FIRST_VERSION, FIRST_VERSION + 1, len(rollout.token_ids_T))
        by_old = abs(rollout.logprobs_T - old.logprobs(group, rollout, temperature))
        by_new = abs(rollout.logprobs_T - new.logprobs(group, rollout, temperature))
        assert by_old[:boundary].max() < LOGPROB_TOLERANCE
        assert by_new[boundary:].max() < LOGPROB_TOLERANCE
    last_old = [abs(i.logprobs_T - new.logprobs(g, i, temperature))[i.version_spans[0][1] - 1] for g, i in split]
    first_new = [abs(i.logprobs_T - old.logprobs(g, i, temperature))[i.version_spans[0][1]] for g, i in split]
    assert min(max(last_old), max(first_new)) > 10 * LOGPROB_TOLERANCE  # a boundary one token off would be seen


def test_nothing_computed_with_old_weights_is_used_after_an_update(actor: Any, new: Reference) -> None:
    group = _generate(actor, _request("greedy", temperature=0.0, max_tokens=40))  # prompt and images seen before
    (rollout,) = group.rollouts
    assert rollout.version_spans[0][0] == FIRST_VERSION + 1
    np.testing.assert_array_equal(rollout.token_ids_T, new.logits(group, rollout).argmax(-1))
    np.testing.assert_allclose(rollout.logprobs_T, new.logprobs(group, rollout), atol=LOGPROB_TOLERANCE)


def test_shutdown_leaves_no_process_and_says_so_to_callers(actor: Any) -> None:
    pending = actor.generate.remote(_request("pending", 8, temperature=2.0, max_tokens=500))
    engine = [process for process in psutil.Process().children(recursive=True) if process.name().startswith("VLLM::")]
    assert engine
    ray.get(actor.shutdown.remote())
    assert not [process for process in engine if process.is_running()]
    for call in (pending, actor.generate.remote(_request("late"))):
        with pytest.raises(EngineDiedError):
            ray.get(call)


@pytest.mark.slow
def test_killing_the_actor_ends_its_engine(ray_local: None) -> None:
    handle = RolloutActor.options(num_cpus=1).remote(MODEL, CONFIG, PromptConfig())
    ray.get(handle.start.remote())
    engine = [process for process in psutil.Process().children(recursive=True) if process.name().startswith("VLLM::")]
    assert {process.name() for process in engine} == {"VLLM::EngineCore", "VLLM::Worker"}
    psutil.Process(engine[0].ppid()).kill()
    _, alive = psutil.wait_procs(engine, timeout=60)
    assert not alive


async def _of(call: Awaitable[Any]) -> Any:
    return await call
