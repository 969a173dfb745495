"""One real engine in its actor, against Hugging Face forward passes of the same weights (`rollout_reference`)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from processes import engine_processes
from rollout_reference import MODEL, Reference, make_request

from sif_ray.config import EngineConfig, PromptConfig
from sif_ray.records import RolloutGroup
from sif_ray.rollout.actor import RolloutActor
from sif_ray.rollout.engine import RolloutRequest
from sif_ray.rollout.errors import EngineDiedError, RolloutRequestError, WeightSyncError
from sif_ray.rollout.weights import Receipt, TensorSpec, WeightUpdate
from sif_ray.rollout.wire import Outbox, SentByActor

CONFIG = EngineConfig(max_model_len=640, max_num_seqs=16, kv_cache_gib=1.0)
LOGPROB_TOLERANCE = 1e-3
FIRST_VERSION = 3


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


def _flipped(update: WeightUpdate, spec: TensorSpec) -> WeightUpdate:
    """The update with one bit of one byte of one tensor changed."""
    bucket = ray.get(update.buckets[spec.bucket]).copy()
    bucket[spec.offset_bytes + spec.num_bytes // 2] ^= 1
    buckets = list(update.buckets)
    buckets[spec.bucket] = ray.put(bucket)
    return replace(update, buckets=tuple(buckets))


def _respecified(update: WeightUpdate, spec: TensorSpec, **changes: Any) -> WeightUpdate:
    changed = tuple(replace(spec, **changes) if item is spec else item for item in update.tensors)
    return replace(update, tensors=changed)


def _swapped(update: WeightUpdate) -> tuple[WeightUpdate, str]:
    """Input and output embedding under each other's name: equal in shape and type."""
    names = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    names |= {right: left for left, right in names.items()}
    tensors = tuple(replace(spec, name=names.get(spec.name, spec.name)) for spec in update.tensors)
    return replace(update, tensors=tensors), next(spec.name for spec in tensors if spec.name in names)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_behaviour_logprobs_are_those_of_the_policy(actor: Any, old: Reference, temperature: float) -> None:
    group = _generate(actor, make_request("group", 4, temperature=temperature, max_tokens=40))
    assert len(group.rollouts) == 4
    assert len({rollout.token_ids_T.tobytes() for rollout in group.rollouts}) > 1
    for rollout in group.rollouts:
        assert rollout.version_spans == ((FIRST_VERSION, len(rollout.token_ids_T)),)
        assert rollout.finish_reason in ("stop", "length")
        np.testing.assert_allclose(
            rollout.logprobs_T, old.logprobs(group, rollout, temperature), atol=LOGPROB_TOLERANCE
        )


def test_a_greedy_rollout_is_the_most_likely_one(actor: Any, old: Reference) -> None:
    group = _generate(actor, make_request("greedy", temperature=0.0, max_tokens=40))
    (rollout,) = group.rollouts
    np.testing.assert_array_equal(rollout.token_ids_T, old.logits(group, rollout).argmax(-1))
    np.testing.assert_allclose(rollout.logprobs_T, old.logprobs(group, rollout), atol=LOGPROB_TOLERANCE)


def test_equal_greedy_rollouts_are_refused_with_the_way_out(actor: Any) -> None:
    with pytest.raises(RolloutRequestError, match="num_rollouts = 4 with temperature 0"):
        _generate(actor, make_request("greedy", 4, temperature=0.0))


def test_a_prompt_without_room_for_an_answer_is_refused(actor: Any) -> None:
    request = replace(make_request("long"), question="closer " * CONFIG.max_model_len)
    with pytest.raises(RolloutRequestError, match=r"max_model_len = 640; raise it"):
        _generate(actor, request)


def test_a_flipped_byte_and_a_skipped_tensor_are_found_in_every_tensor(actor: Any, new: Reference) -> None:
    update = new.update(FIRST_VERSION + 1, put=ray.put)
    for index, spec in enumerate(update.tensors):
        with pytest.raises(WeightSyncError, match=re.escape(f"{spec.name}: checksum")):
            ray.get(actor.update_weights.remote(_flipped(update, spec)))
        skipped = update.tensors[:index] + update.tensors[index + 1 :]
        with pytest.raises(WeightSyncError, match=re.escape(f"{spec.name}: missing from the update")):
            ray.get(actor.update_weights.remote(replace(update, tensors=skipped)))


@pytest.mark.parametrize(
    "damage",
    [
        lambda update, spec: (_flipped(update, spec), f"{spec.name}: checksum"),
        lambda update, spec: (_respecified(update, spec, name="visual.x"), f"{spec.name}: missing"),
        lambda update, spec: (_respecified(update, spec, shape=spec.shape[::-1]), f"{spec.name}: shape"),
        lambda update, spec: (_respecified(update, spec, dtype="bfloat16"), f"{spec.name}: checksum"),
        lambda update, spec: (_respecified(update, spec, dtype="int8"), f"{spec.name}: dtype"),
        lambda update, spec: (replace(update, tensors=(*update.tensors, spec)), f"{spec.name}: appears twice"),
        lambda update, spec: (replace(update, buckets=update.buckets[:1]), "bucket 1 of 1 is missing"),
        lambda update, spec: (_swapped(update)[0], f"{_swapped(update)[1]}: checksum"),
        lambda update, spec: (replace(update, version=FIRST_VERSION), f"version {FIRST_VERSION} is stale"),
        lambda update, spec: (replace(update, version=FIRST_VERSION - 1), f"version {FIRST_VERSION - 1} is stale"),
    ],
    ids=[
        "byte",
        "name",
        "shape",
        "type",
        "strange-type",
        "repeated",
        "bucket",
        "swapped",
        "same-version",
        "old-version",
    ],
)
def test_a_wrong_update_is_refused_and_the_old_weights_generate_on(
    actor: Any, old: Reference, new: Reference, damage: Callable[[WeightUpdate, TensorSpec], tuple[WeightUpdate, str]]
) -> None:
    update = new.update(FIRST_VERSION + 1, put=ray.put)
    spec = next(spec for spec in update.tensors if spec.bucket == 1 and len(set(spec.shape)) == 2)
    damaged, message = damage(update, spec)
    with pytest.raises(WeightSyncError, match=re.escape(message)):
        ray.get(actor.update_weights.remote(damaged))
    assert ray.get(actor.version.remote()) == FIRST_VERSION
    (rollout,) = (group := _generate(actor, make_request("damaged", max_tokens=6))).rollouts
    assert rollout.version_spans == ((FIRST_VERSION, len(rollout.token_ids_T)),)
    np.testing.assert_allclose(rollout.logprobs_T, old.logprobs(group, rollout), atol=LOGPROB_TOLERANCE)


def test_an_update_in_mid_generation_is_exact_to_the_token(actor: Any, old: Reference, new: Reference) -> None:
    temperature = 2.0  # flat: few rollouts end early
    update = new.update(FIRST_VERSION + 1, put=ray.put)

    async def generate_and_update() -> tuple[list[RolloutGroup], Receipt]:
        ready = asyncio.ensure_future(
            _of(actor.generate.remote(make_request("ready", 2, temperature=temperature, max_tokens=4)))
        )
        requests = [make_request("long" * n, 8, temperature=temperature, max_tokens=500) for n in range(1, 4)]
        groups = [asyncio.ensure_future(_of(actor.generate.remote(request))) for request in requests]
        await ready  # the others share its batch, a hundred times longer
        receipt = await actor.update_weights.remote(update)
        return [await group for group in groups], receipt

    groups, receipt = asyncio.run(generate_and_update())
    assert (receipt.version, receipt.num_tensors) == (FIRST_VERSION + 1, len(update.tensors))
    assert (receipt.checksum, receipt.num_bytes) == (update.checksum, update.num_bytes)
    assert 0 < receipt.pause_s < receipt.seconds
    assert 0 < receipt.computed_prompt_tokens < receipt.prompt_tokens
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


def test_an_urgent_request_does_not_wait_in_the_queue(actor: Any) -> None:
    async def answered() -> list[str]:
        ended: list[str] = []

        async def ask(request: RolloutRequest) -> None:
            await _of(actor.generate.remote(request))
            ended.append(request.ticket_id)

        others = [make_request(f"other {n}", 8, temperature=2.0, max_tokens=60) for n in range(12)]  # 96 for 16 places
        urgent = replace(make_request("urgent", 2, temperature=2.0, max_tokens=4), urgent=True)
        await asyncio.gather(*(ask(request) for request in [*others, urgent]))
        return ended

    assert asyncio.run(answered()).index("urgent") < 4


def test_nothing_computed_with_old_weights_is_used_after_an_update(actor: Any, new: Reference) -> None:
    group = _generate(actor, make_request("greedy", temperature=0.0, max_tokens=40))  # prompt and images seen before
    (rollout,) = group.rollouts
    assert rollout.version_spans[0][0] == FIRST_VERSION + 1
    np.testing.assert_array_equal(rollout.token_ids_T, new.logits(group, rollout).argmax(-1))
    np.testing.assert_allclose(rollout.logprobs_T, new.logprobs(group, rollout), atol=LOGPROB_TOLERANCE)


def test_weights_sent_over_a_process_group_are_checked_like_those_of_the_object_store(
    actor: Any, old: Reference, new: Reference
) -> None:
    version = FIRST_VERSION + 2
    learner = ray.remote(num_cpus=0)(Outbox).remote("gloo")
    update = old.update(version)
    spec = update.tensors[40]
    update.buckets[spec.bucket][spec.offset_bytes] ^= 1
    sent = ray.get(learner.hold.remote(update, SentByActor(learner, version)))
    with pytest.raises(WeightSyncError, match=re.escape(f"{spec.name}: checksum")):
        ray.get(actor.update_weights.remote(sent))
    group = _generate(actor, make_request("still new", max_tokens=6))
    np.testing.assert_allclose(
        group.rollouts[0].logprobs_T, new.logprobs(group, group.rollouts[0]), atol=LOGPROB_TOLERANCE
    )

    sent = ray.get(learner.hold.remote(old.update(version), SentByActor(learner, version)))
    receipt = ray.get(actor.update_weights.remote(sent))
    assert (receipt.version, receipt.checksum) == (version, sent.checksum)
    group = _generate(actor, make_request("old again", max_tokens=20))
    (rollout,) = group.rollouts
    assert rollout.version_spans == ((version, len(rollout.token_ids_T)),)
    np.testing.assert_allclose(rollout.logprobs_T, old.logprobs(group, rollout), atol=LOGPROB_TOLERANCE)

    gone = replace(sent, version=version + 5, send=SentByActor(learner, version + 5))
    with pytest.raises(WeightSyncError, match="is not held any more"):
        ray.get(actor.update_weights.remote(gone))
    ray.kill(learner)


def test_shutdown_leaves_no_process_and_says_so_to_callers(actor: Any) -> None:
    pending = actor.generate.remote(make_request("pending", 8, temperature=2.0, max_tokens=500))
    engine = engine_processes()
    assert len(engine) == 1, psutil.Process().children(recursive=True)  # the core, and the worker inside it
    ray.get(actor.shutdown.remote())
    assert not [process for process in engine if process.is_running()]
    for call in (pending, actor.generate.remote(make_request("late"))):
        with pytest.raises(EngineDiedError):
            ray.get(call)


@pytest.mark.slow
def test_killing_the_actor_ends_its_engine(ray_local: None) -> None:
    handle = RolloutActor.options(num_cpus=1).remote(MODEL, CONFIG, PromptConfig())
    ray.get(handle.start.remote())
    engine = engine_processes()
    assert len(engine) == 1
    psutil.Process(engine[0].ppid()).kill()
    _, alive = psutil.wait_procs(engine, timeout=60)
    assert not alive


async def _of(call: Awaitable[Any]) -> Any:
    return await call
