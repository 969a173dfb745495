"""What the stages of a GRPO step do per second, each alone on the machine: generation, rewards, log-probs, update."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from sif_ray.bench.cpu import CpuWatch
from sif_ray.config import GrpoConfig
from sif_ray.judge.exact import ExactMatchJudge
from sif_ray.learner.engine import LearnerEngine
from sif_ray.learner.microbatches import split_branches
from sif_ray.loop.requests import training_request
from sif_ray.loop.rewarder import GroupScores, Rewarder
from sif_ray.records import RolloutGroup, Sample, ScoredGroup
from sif_ray.rollout.engine import RolloutEngine

T = TypeVar("T")

WARM_UP_STEPS = 1


@dataclass(frozen=True)
class Lone:
    """One stage. Seconds are per completion."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class LoneStages:
    """All stages, on the same groups."""

    generation: Lone
    rewards: Lone
    log_probs: Lone  # a forward pass; a step needs none of its own, the parity probe does
    update: Lone
    prompts_per_group: float  # computed by the learner for a group

    def bound_completions_per_s(self, num_cpus: int) -> float:
        """What no overlap of generation, rewards and update can exceed: the busiest of them computes all the time, or
        all CPUs do."""
        needed = (self.generation, self.rewards, self.update)
        return 1 / max(max(stage.wall_s for stage in needed), sum(stage.cpu_s for stage in needed) / num_cpus)


def measure_lone_stages(
    config: GrpoConfig, samples: Sequence[Sample], steps: int
) -> tuple[LoneStages, list[list[ScoredGroup]]]:
    """The stages of `steps` steps of a run of `config`, in this process and the engine's, and the steps' batches."""
    samples = samples[: (steps + WARM_UP_STEPS) * config.groups_per_step]
    generation, groups = asyncio.run(_generate(config, samples))
    rewards, scored = _timed(lambda: asyncio.run(_score(config, groups, samples)), len(groups) * config.group_size)
    size = config.groups_per_step
    batches = [scored[at : at + size] for at in range(0, len(scored), size)]
    learner = make_learner(config, total_steps=len(batches))
    try:
        for version, batch in enumerate(batches[:WARM_UP_STEPS]):
            learner.train_step(batch, version)
        later = list(enumerate(batches))[WARM_UP_STEPS:]
        completions = len(later) * size * config.group_size
        log_probs, _ = _timed(
            lambda: [learner.log_probs([one.group for one in batch]) for _, batch in later], completions
        )
        update, _ = _timed(lambda: [learner.train_step(batch, version) for version, batch in later], completions)
    finally:
        learner.close()
    return LoneStages(generation, rewards, log_probs, update, _prompts_per_group(config, groups)), batches


def make_learner(config: GrpoConfig, total_steps: int) -> LearnerEngine:
    """The learner of a run of `config`, of one rank, in this process."""
    return LearnerEngine(
        config.learner,
        config.policy,
        total_steps=total_steps,
        objective=config.objective,
        sampling=config.sampling,
        max_pixels=config.max_pixels,
    )


def groups_at_once(config: GrpoConfig) -> int:
    """Enough groups that an engine always has as many sequences as it takes."""
    return -(-config.engine.max_num_seqs // config.group_size) + 1


async def _generate(config: GrpoConfig, samples: Sequence[Sample]) -> tuple[Lone, list[RolloutGroup]]:
    """Every sample's group, `groups_at_once`. The first step's do not count."""
    engine = RolloutEngine(config.policy, config.engine, config.prompt, max_pixels=config.max_pixels, seed=config.seed)
    await engine.start()
    try:
        await engine.warm_up()
        room = asyncio.Semaphore(groups_at_once(config))

        async def group_of(sample: Sample) -> RolloutGroup:
            async with room:
                return await engine.generate(training_request(config, sample, sample.sample_id))

        first = WARM_UP_STEPS * config.groups_per_step
        groups = list(await asyncio.gather(*map(group_of, samples[:first])))
        with CpuWatch() as watch:
            started_s = time.perf_counter()
            groups += await asyncio.gather(*map(group_of, samples[first:]))
            seconds = time.perf_counter() - started_s
        count = (len(samples) - first) * config.group_size
        return Lone(seconds / count, watch.total_s / count), groups
    finally:
        await engine.shutdown()


async def _score(config: GrpoConfig, groups: Sequence[RolloutGroup], samples: Sequence[Sample]) -> list[ScoredGroup]:
    rewarder = Rewarder(config.rewards, config.profile, ExactMatchJudge())
    scored = []
    for group, sample in zip(groups, samples, strict=True):
        found = await rewarder.score([rollout.text for rollout in group.rollouts], sample, None)
        assert isinstance(found, GroupScores)
        scored.append(ScoredGroup(group, found.rewards_G, found.terms_G))
    return scored


def _timed(work: Callable[[], T], completions: int) -> tuple[Lone, T]:
    with CpuWatch() as watch:
        started_s = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - started_s
    return Lone(seconds / completions, watch.total_s / completions), result


def _prompts_per_group(config: GrpoConfig, groups: Sequence[RolloutGroup]) -> float:
    budget = config.learner.micro_batch_tokens
    return float(
        np.mean(
            [
                len(
                    split_branches(
                        len(group.prompt_token_ids_P), [len(one.token_ids_T) for one in group.rollouts], budget
                    )
                )
                for group in groups
            ]
        )
    )
