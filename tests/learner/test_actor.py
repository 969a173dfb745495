"""Two ZeRO-3 ranks in Ray actors do what one ZeRO-0 rank does, and end together when one of them dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time

import numpy as np
import pytest
import ray
import torch
from processes import processes_named

from sif_ray.config import GrpoConfig, LearnerConfig, LoraConfig
from sif_ray.learner import process_group
from sif_ray.learner.actor import LearnerDied, LearnerGroup
from sif_ray.learner.engine import LearnerEngine, LearnerError
from sif_ray.rollout.weights import read_tensors

DROPPING_LORA = LoraConfig(rank=4, dropout=0.2)
PROMPT_S = 20.0  # to notice a death on a busy machine; a collective gives up after ten minutes


def config_of(policy: str, num_ranks: int, zero_stage: int, lora: LoraConfig | None = None) -> GrpoConfig:
    learner = LearnerConfig(
        num_ranks=num_ranks,
        zero_stage=zero_stage,
        lora=lora or LoraConfig(),
        learning_rate=1e-3,
        micro_batch_tokens=100,
        num_cpus_per_rank=0.5,
    )
    return GrpoConfig(policy=policy, learner=learner)


def engine_of(config: GrpoConfig) -> LearnerEngine:
    return LearnerEngine(config.learner, config.policy, total_steps=4, objective=config.objective)


@contextlib.asynccontextmanager
async def started(config: GrpoConfig):
    learner = LearnerGroup(config)
    try:
        await learner.start(total_steps=4)
        yield learner
    finally:
        learner.shutdown()


async def published(learner: LearnerGroup, version: int) -> dict[str, torch.Tensor]:
    update = await learner.publish(version)
    assert update.version == version
    buckets = [ray.get(reference).copy() for reference in update.buckets]
    return {name: tensor.clone() for name, tensor in read_tensors(update.tensors, buckets)}


def weights_of(engine: LearnerEngine) -> dict[str, torch.Tensor]:
    return dict(pair for bucket in engine.weight_buckets() for pair in bucket)


def differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> torch.Tensor:
    assert list(found) == list(expected)
    return torch.cat([(found[name] - expected[name]).abs().flatten() for name in expected])


@pytest.mark.parametrize("lora", [LoraConfig(), pytest.param(LoraConfig(rank=4), marks=pytest.mark.slow)])
def test_two_ranks_agree_with_one(ray_local, process_group_of_one, tiny_policy, make_group, lora):
    # one group leaves a rank without any; of three, one rank gets two and more micro-batches than the other
    groups = [make_group(0), make_group(1, (4, 11)), make_group(2, (30, 30, 30))]
    batches = [groups[:1], groups]

    async def on_two_ranks():
        async with started(config_of(tiny_policy, num_ranks=2, zero_stage=3, lora=lora)) as learner:
            metrics, weights = [], []
            for version, batch in enumerate(batches):
                metrics.append(await learner.train(batch, version))
                weights.append(await published(learner, version + 1))
            with pytest.raises(LearnerError, match="no rank has groups"):
                await learner.train([], 2)
            return metrics, weights, (await learner.log_probs([groups[0].group]))[0]

    metrics, weights, logprobs = asyncio.run(on_two_ranks())
    alone = engine_of(config_of(tiny_policy, num_ranks=1, zero_stage=0, lora=lora))
    for version, batch in enumerate(batches):
        expected = alone.train_step(batch, version)
        idle = metrics[version].pop("padding_share") - expected.pop("padding_share")
        assert (idle > 0.3) == (version == 0)  # half of the passes are those of the rank without a group
        assert metrics[version] == pytest.approx(expected, rel=2e-3, abs=2e-4)
        # a step of Adam where a gradient is rounding noise may go either way
        apart = differences(weights[version], weights_of(alone))
        assert apart.max() < 2.1e-3 * (version + 1)
        assert (apart < 1e-5).float().mean() > (0.99, 0.95)[version]
    for found_T, alone_T in zip(logprobs, alone.log_probs([groups[0].group])[0], strict=True):
        np.testing.assert_allclose(found_T, alone_T, atol=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LoraConfig(), DROPPING_LORA])
def test_fresh_ranks_resume_exactly(ray_local, tiny_policy, make_group, merge_by_peft, tmp_path, lora):
    groups = [make_group(0), make_group(1, (4, 11))]
    config = config_of(tiny_policy, num_ranks=2, zero_stage=3, lora=lora)

    async def resume():
        async with started(config) as learner:
            await learner.train(groups, version=0)
            await learner.save_checkpoint(str(tmp_path), {"version": 1})
            if lora.rank:  # what two ranks publish together is what peft makes of what they have saved
                saved = consolidated(str(tmp_path))
                parameters = {name.removeprefix("policy."): value for name, value in saved.items()}
                merged = merge_by_peft(parameters, alpha=2 * lora.rank)
                assert differences(await published(learner, 1), merged).max() < 1e-7
            expected = await learner.train(groups, version=1)
            weights = await published(learner, 2)
        async with started(config) as learner:
            assert await learner.load_checkpoint(str(tmp_path)) == {"version": 1}
            assert await learner.train(groups, version=1) == expected
            assert differences(await published(learner, 2), weights).max() == 0

    asyncio.run(resume())


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=4)])
def test_another_number_of_ranks_goes_on_with_the_same_weights_and_optimiser(
    ray_local, tiny_policy, make_group, tmp_path, lora, zero_stage
):
    groups = [make_group(0), make_group(1, (4, 11))]

    async def resume():
        async with started(config_of(tiny_policy, 2, zero_stage, lora)) as learner:
            await learner.train(groups, version=0)
            await learner.save_checkpoint(str(tmp_path), {"version": 1})
            weights = await published(learner, 1)
            expected = await learner.train(groups, version=1)
            later = await published(learner, 2)
        async with started(config_of(tiny_policy, 1, zero_stage, lora)) as learner:
            assert await learner.load_checkpoint(str(tmp_path)) == {"version": 1}
            assert differences(await published(learner, 1), weights).max() < 1e-7
            metrics = await learner.train(groups, version=1)
            apart = differences(await published(learner, 2), later)
        for name in ("loss", "kl", "grad_norm", "lr"):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5)
        assert (apart < 1e-5).float().mean() > 0.95  # where a gradient is rounding noise, Adam may go either way
        assert not (tmp_path / "step1_universal").exists()

    asyncio.run(resume())


def test_ranks_end_with_one_that_is_killed_and_start_afresh(ray_local, tiny_policy, make_group):
    config = config_of(tiny_policy, num_ranks=2, zero_stage=2)
    small, large = [make_group(0)], [make_group(seed, (90,) * 8) for seed in range(8)]

    async def killed_in_mid_step():
        async with started(config) as learner:
            first = await learner.train(small, version=0)
            step = asyncio.ensure_future(learner.train(large, version=1))
            while len(processes_named("ray::LearnerActor.train")) < 2:
                assert not step.done()
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.3)
            old = processes_named("ray::LearnerActor.train")
            assert len(old) == 2
            os.kill(old[1].pid, signal.SIGKILL)
            killed_s = time.monotonic()
            with pytest.raises(LearnerDied, match=r"rank \d of 2 died in train: .*from the last checkpoint"):
                await step
            with pytest.raises(LearnerDied, match=r"rank \d of 2 died in publish"):
                await learner.publish(version=2)
            assert time.monotonic() - killed_s < PROMPT_S
        async with started(config) as learner:
            assert not any(process.is_running() for process in old)
            assert await learner.train(small, version=0) == pytest.approx(first, rel=1e-4)

    asyncio.run(killed_in_mid_step())


def consolidated(folder: str) -> dict[str, torch.Tensor]:
    process_group.load_deepspeed()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return get_fp32_state_dict_from_zero_checkpoint(folder, exclude_frozen_parameters=True)
