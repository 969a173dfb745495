"""4,096 GPUs for 1,000 steps through the real ledger, on one core."""

from __future__ import annotations

import time

import pytest

from sif_ray import config as configuration
from sif_ray.plan.gpus import find_gpu
from sif_ray.plan.rates import Assumptions, workload_of
from sif_ray.plan.scenario import Failures
from sif_ray.plan.search import Division, Request
from sif_ray.plan.simulation import simulate
from sif_ray.resources.shapes import KNOWN

OVERRIDES = (
    "groups_per_step=512",
    "group_size=8",
    "engine.tensor_parallel_size=8",
    "engine.num_gpus=8",
    "num_reward_workers=64",
    "judge.max_concurrency=8192",
    "max_pixels=262144",
    "judge.max_wait_s=100",
    "objective.kl_beta=0",
    "learner.zero_stage=3",
    "learner.gradient_checkpointing=true",
)


def request_of_72b() -> Request:
    config = configuration.load("grpo", None, OVERRIDES)
    shape = KNOWN["qwen2.5-vl-72b"]
    workload = workload_of(config, shape, prompt_tokens=0, response_tokens=400, response_cv=0.6)
    return Request(config, shape, find_gpu("h100"), workload, Assumptions(), judge_latency_s=0.5)


@pytest.mark.slow  # about a minute on a core of a laptop
@pytest.mark.timeout(900)
def test_4096_gpus_for_1000_steps():
    scenario = request_of_72b().scenario(Division(512, 448, 2), 1000, Failures(gpu_mtbf_h=50_000.0))
    assert scenario.num_gpus == 4096
    started_s = time.process_time()
    outcome = simulate(scenario)
    seconds = time.process_time() - started_s
    hours = outcome.seconds / 3600
    print(f"4,096 GPUs, 1,000 steps, {hours:.1f} simulated hours: {seconds:.1f} s of one core")
    assert len(outcome.steps) == 1000 and outcome.tickets["trained"] == 512_000
    assert max(max(step.staleness) for step in outcome.steps) <= 2
    # Failures come as often as GPUs x hours / mean time says: within 5 standard deviations of a Poisson count.
    expected = 4096 * hours / 50_000
    assert abs(outcome.engine_deaths + outcome.learner_deaths - expected) <= 5 * expected**0.5 + 1
