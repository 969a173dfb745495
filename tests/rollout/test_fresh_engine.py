"""An updated engine against one that was loaded from the new checkpoint: same weights, same outputs, nothing stale.

Without Ray: the engine object itself.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from processes import engine_processes
from rollout_reference import MODEL, Reference, make_request
from transformers import AutoConfig, AutoModelForImageTextToText

from sif_ray.config import EngineConfig, PromptConfig
from sif_ray.policy.model import save_policy
from sif_ray.records import Rollout
from sif_ray.rollout.engine import RolloutEngine
from sif_ray.rollout.errors import EngineDiedError, WeightSyncError
from sif_ray.rollout.wire import Outbox

CONFIG = EngineConfig(max_model_len=640, max_num_seqs=16, kv_cache_gib=0.5)
BLOCK = 32  # tokens of the prefix cache on a CPU


def test_a_policy_with_tied_embeddings_is_refused_by_name_before_it_is_loaded_on_a_cpu(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(MODEL)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    config.save_pretrained(tmp_path / "tied")
    engine = RolloutEngine(str(tmp_path / "tied"), CONFIG, PromptConfig())
    with pytest.raises(WeightSyncError, match=r"lm_head\.weight is tied .*/tied \(tie_word_embeddings\)"):
        asyncio.run(engine.start())
    assert not engine_processes()


async def _greedy(engine: RolloutEngine, name: str) -> Rollout:
    group = await engine.generate(make_request(name, temperature=0.0, max_tokens=40))
    return group.rollouts[0]


async def _digests(engine: RolloutEngine) -> list[dict[str, str]]:
    """SHA-256 of every parameter in every worker, by vLLM."""
    assert engine._client is not None
    return await engine._client._llm.compute_weight_checksums()


@pytest.mark.slow
def test_new_weights_of_the_vision_tower_alone_reach_everything_computed_from_an_image(tmp_path: Path) -> None:
    new = Reference(noise=0.5, only="visual")
    new.save(str(tmp_path / "new"))

    async def updated() -> tuple[Rollout, Rollout, list[dict[str, str]]]:
        engine = RolloutEngine(MODEL, CONFIG, PromptConfig())
        await engine.start()
        before = await _greedy(engine, "same picture")
        again = await _greedy(engine, "same picture")  # every cache holds this prompt and its images now
        np.testing.assert_array_equal(before.logprobs_T, again.logprobs_T)
        await engine.update_weights(new.update(1))
        after, digests = await _greedy(engine, "same picture"), await _digests(engine)

        # An update that fails half-way, past its verification, ends the engine.
        processes = engine_processes()
        assert processes and engine._client is not None
        with pytest.raises(EngineDiedError, match="version 7 was loaded in part"):
            async with engine._client.paused():
                await engine._client.load_verified(7)
        assert not [process for process in processes if process.is_running()]
        with pytest.raises(EngineDiedError):
            await _greedy(engine, "late")
        return before, after, digests

    async def loaded() -> tuple[Rollout, list[dict[str, str]]]:
        engine = RolloutEngine(str(tmp_path / "new"), CONFIG, PromptConfig(), version=1)
        await engine.start()
        try:
            fresh, digests = await _greedy(engine, "same picture"), await _digests(engine)
            await _check_that_a_group_computes_its_prompt_once(engine)
            return fresh, digests
        finally:
            await engine.shutdown()

    before, after, digests = asyncio.run(updated())
    fresh, fresh_digests = asyncio.run(loaded())
    assert digests == fresh_digests
    np.testing.assert_array_equal(after.token_ids_T, fresh.token_ids_T)
    np.testing.assert_allclose(after.logprobs_T, fresh.logprobs_T, atol=1e-5)
    length = min(len(before.logprobs_T), len(after.logprobs_T))
    assert abs(before.logprobs_T[:length] - after.logprobs_T[:length]).max() > 1e-2  # stale images would be seen


@pytest.mark.slow
def test_an_engine_without_memory_for_an_update_is_ended() -> None:
    async def run() -> None:
        engine = RolloutEngine(MODEL, CONFIG, PromptConfig())
        await engine.start()
        (core,) = engine_processes()
        room = core.memory_info().vms + 2**20
        core.rlimit(psutil.RLIMIT_AS, (room, room))
        with pytest.raises(EngineDiedError, match=r"the update was not verified; .*Cannot allocate memory"):
            await engine.update_weights(Reference(noise=0.5).update(1))
        assert not core.is_running()
        with pytest.raises(EngineDiedError):
            await _greedy(engine, "late")

    asyncio.run(run())


def test_a_killed_engine_fails_whatever_it_was_asked_at_once() -> None:
    async def run() -> None:
        engine = RolloutEngine(MODEL, CONFIG, PromptConfig())
        await engine.start()
        (core,) = engine_processes()
        core.suspend()  # nothing that it is asked from here on is answered
        calls = [engine.update_weights(Reference(noise=0.5).update(1)), _greedy(engine, "pending")]
        asked = [asyncio.ensure_future(call) for call in calls]
        done, _ = await asyncio.wait(asked, timeout=3.0)
        assert not done
        core.kill()
        done, late = await asyncio.wait(asked, timeout=30.0)
        assert not late
        assert {type(call.exception()) for call in done} == {EngineDiedError}
        await engine.shutdown()

    asyncio.run(run())


def test_a_killed_engine_is_noticed_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's thread that watches the engine core may die of a core that is just ending."""
    watch = "vllm.v1.engine.utils.CoreEngineProcManager.monitor_engine_liveness"
    monkeypatch.setattr(watch, lambda manager: manager.manager_stopped.wait())
    test_a_killed_engine_fails_whatever_it_was_asked_at_once()


async def _check_that_a_group_computes_its_prompt_once(engine: RolloutEngine) -> None:
    assert engine._client is not None and engine._processor is not None
    engine._client.take_prompt_tokens()
    request = replace(make_request("a new picture", 8, max_tokens=8), question="Which of them is closer to you? " * 8)
    group = await engine.generate(request)
    asked = engine._client.take_prompt_tokens()
    prompt = len(group.prompt_token_ids_P)
    print(f"prompt of {prompt} tokens, group of 8: {asked.computed} computed of {asked.total}")
    assert asked.total == 8 * prompt
    assert prompt <= asked.computed <= prompt + 7 * BLOCK  # whole blocks are shared, the rest of a block is not
    last_image_token = max(np.flatnonzero(group.prompt_token_ids_P == engine._processor.image_token_id))
    assert prompt - BLOCK > last_image_token  # the images lie in shared blocks, so they are encoded once as well


@pytest.mark.slow
def test_tensor_parallel_workers_hold_one_policy(tmp_path: Path) -> None:
    """Two workers, a half of every layer each: log-probs of the plain model, before and after an update."""
    config = AutoConfig.from_pretrained(MODEL)  # the toy's 5 and 3 heads cannot be halved
    text, vision = config.text_config, config.vision_config
    text.num_attention_heads = text.num_key_value_heads = 4
    text.hidden_size = vision.out_hidden_size = 4 * 32
    vision.num_heads, vision.hidden_size = 2, 2 * 32
    save_policy(AutoModelForImageTextToText.from_config(config), MODEL, str(tmp_path / "even"))
    model = str(tmp_path / "even")
    old, new = Reference(0.0, model=model), Reference(0.5, model=model)

    async def check(engine: RolloutEngine, reference: Reference, version: int) -> None:
        group = await engine.generate(make_request("halves", 4, max_tokens=24))
        for rollout in group.rollouts:
            assert rollout.version_spans == ((version, len(rollout.token_ids_T)),)
            np.testing.assert_allclose(rollout.logprobs_T, reference.logprobs(group, rollout), atol=1e-3)

    async def run() -> None:
        two = EngineConfig(max_model_len=640, max_num_seqs=8, kv_cache_gib=0.5, tensor_parallel_size=2)
        engine = RolloutEngine(model, two, PromptConfig())
        await engine.start()
        try:
            assert len(engine_processes()) == 3  # core and two workers
            await check(engine, old, 0)
            update = new.update(1)
            update.buckets[0][update.tensors[3].offset_bytes] ^= 1
            with pytest.raises(WeightSyncError, match=f"{update.tensors[3].name}: checksum"):
                await engine.update_weights(update)
            await check(engine, old, 0)
            receipt = await engine.update_weights(new.update(1))
            assert receipt.checksum == new.update(1).checksum
            await check(engine, new, 1)
            outbox = Outbox("gloo")
            await engine.update_weights(outbox.hold(old.update(2), partial(asyncio.to_thread, outbox.send, 2)))
            await check(engine, old, 2)
            halves: list[dict[str, Any]] = await _digests(engine)
            assert len(halves) == 2 and halves[0] != halves[1]
        finally:
            await engine.shutdown()

    asyncio.run(run())
