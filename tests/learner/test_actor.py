"""Two ZeRO-3 ranks in Ray actors do what one ZeRO-0 rank does."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import ray
import torch

from sif_ray.config import GrpoConfig, LearnerConfig
from sif_ray.learner.actor import LearnerGroup
from sif_ray.learner.engine import LearnerEngine
from sif_ray.rollout.weights import read_tensors


def config_of(policy: str, num_ranks: int, zero_stage: int) -> GrpoConfig:
    learner = LearnerConfig(
        num_ranks=num_ranks, zero_stage=zero_stage, learning_rate=1e-3, micro_batch_tokens=100, num_cpus_per_rank=0.5
    )
    return GrpoConfig(policy=policy, learner=learner)


def test_two_ranks_agree_with_one(ray_local, process_group_of_one, tiny_policy, make_group):
    # three groups of different sizes: one rank gets two of them and more micro-batches than the other
    groups = [make_group(0), make_group(1, (4, 11)), make_group(2, (30, 30, 30))]
    config = config_of(tiny_policy, num_ranks=2, zero_stage=3)

    async def on_two_ranks():
        learner = LearnerGroup(config)
        try:
            await learner.start(total_steps=4)
            metrics = [await learner.train(groups, version) for version in (0, 1)]
            logprobs = await learner.log_probs([groups[0].group])
            update = await learner.publish(version=2)
            return metrics, logprobs[0], update, [ray.get(reference).copy() for reference in update.buckets]
        finally:
            learner.shutdown()

    metrics, logprobs, update, buckets = asyncio.run(on_two_ranks())
    config = config_of(tiny_policy, num_ranks=1, zero_stage=0)
    alone = LearnerEngine(config.learner, tiny_policy, total_steps=4, objective=config.objective)
    for version, found in enumerate(metrics):
        assert found == pytest.approx(alone.train_step(groups, version), rel=2e-3, abs=2e-4)
    for found_T, alone_T in zip(logprobs, alone.log_probs([groups[0].group])[0], strict=True):
        np.testing.assert_allclose(found_T, alone_T, atol=5e-3)
    assert update.version == 2
    weights = dict(read_tensors(update.tensors, buckets))
    expected = dict(pair for bucket in alone.weight_buckets() for pair in bucket)
    assert list(weights) == list(expected)
    differences = torch.cat([(weights[name] - expected[name]).abs().flatten() for name in expected])
    assert differences.max() < 4e-3  # two Adam steps where a gradient is rounding noise
    assert (differences < 1e-5).float().mean() > 0.95


@pytest.mark.slow
def test_fresh_ranks_resume_a_zero_3_checkpoint(ray_local, tiny_policy, make_group, tmp_path):
    groups = [make_group(0), make_group(1, (4, 11))]
    config = config_of(tiny_policy, num_ranks=2, zero_stage=3)

    async def resume():
        first, second = LearnerGroup(config), LearnerGroup(config)
        try:
            await first.start(total_steps=4)
            await first.train(groups, version=0)
            await first.save_checkpoint(str(tmp_path), {"version": 1})
            expected = await first.train(groups, version=1)
            await second.start(total_steps=4)
            assert await second.load_checkpoint(str(tmp_path)) == {"version": 1}
            assert await second.train(groups, version=1) == pytest.approx(expected, rel=1e-3, abs=1e-4)
        finally:
            first.shutdown()
            second.shutdown()

    asyncio.run(resume())
