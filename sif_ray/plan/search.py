"""How to divide a number of GPUs between learner and engines, and how stale groups may be.

Every division whose learner fits into memory is estimated as if its stages were even; the most promising ones are
simulated, each with every window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sif_ray.config import ConfigError, GrpoConfig
from sif_ray.plan.figures import Figures, figures_of
from sif_ray.plan.gpus import Gpu
from sif_ray.plan.rates import Assumptions, Workload, estimate, max_sequences
from sif_ray.plan.scenario import Failures, Scenario
from sif_ray.plan.simulation import simulate
from sif_ray.resources.memory import GIB, learner_memory
from sif_ray.resources.shapes import PolicyShape

WINDOWS = (0, 1, 2, 4)  # values of max_staleness
SIMULATED = 3  # divisions per window; of large batches, whose stages are even, the best estimate alone
TRIAL_GROUPS = 16_000  # of one simulation, as far as its steps are not too few
LENGTHS = 256  # groups whose completions are drawn for an estimate
ENOUGH = 1.02  # a smaller window is better if it costs no more than this


@dataclass(frozen=True)
class Division:
    """Who gets the GPUs."""

    learner_ranks: int
    num_engines: int
    max_staleness: int


@dataclass(frozen=True)
class Request:
    """What is to be planned. `config` says everything but the division; it must have passed `shape_complaints`."""

    config: GrpoConfig
    shape: PolicyShape
    gpu: Gpu
    workload: Workload
    assumed: Assumptions
    judge_latency_s: float
    seed: int = 0

    def scenario(self, division: Division, num_steps: int, failures: Failures | None = None) -> Scenario:
        """The run under a division."""
        config = self.config
        rates = estimate(
            config,
            self.shape,
            self.gpu,
            self.workload,
            self.assumed,
            num_engines=division.num_engines,
            learner_ranks=division.learner_ranks,
            judge_latency_s=self.judge_latency_s,
        )
        return Scenario(
            num_steps=num_steps,
            groups_per_step=config.groups_per_step,
            group_size=config.group_size,
            max_staleness=division.max_staleness,
            num_engines=division.num_engines,
            gpus_per_engine=config.engine.tensor_parallel_size,
            max_num_seqs=max_sequences(config, self.shape, self.gpu, self.workload),
            learner_ranks=division.learner_ranks,
            lengths=self.workload.lengths,
            prompt_tokens=self.workload.prompt_tokens,
            rates=rates,
            num_reward_workers=config.num_reward_workers,
            judge_calls=config.judge.max_concurrency,
            lease_timeout_s=config.lease_timeout_s,
            checkpoint_every=config.checkpoint_every,
            failures=failures or Failures(),
            seed=self.seed,
        )


def search(request: Request, num_gpus: int) -> list[Figures]:
    """The simulated divisions of `num_gpus`, best first. Raises `ConfigError` where none can work."""
    ranks = list(learner_sizes(request, num_gpus))
    size = request.config.engine.tensor_parallel_size
    figures: list[Figures] = []
    for window in WINDOWS:
        divisions = [Division(count, (num_gpus - count) // size, window) for count in ranks]
        divisions.sort(key=lambda division: estimated_step_s(request.scenario(division, 1)))
        affordable = TRIAL_GROUPS // request.config.groups_per_step
        steps = min(30, max(4 + 2 * window, affordable))
        for division in divisions[: SIMULATED if affordable >= 10 else 1]:
            figures.append(figures_of(simulate(request.scenario(division, steps)), request.gpu.usd_per_hour))
    return ranked(figures)


def ranked(figures: Sequence[Figures]) -> list[Figures]:
    """By the mean seconds of a step, once settled: trial runs differ in length. First the one with the smallest window
    among those that are about as fast as any."""
    by_speed = sorted(figures, key=lambda one: one.settled_step_s)
    good = [one for one in by_speed if one.settled_step_s <= ENOUGH * by_speed[0].settled_step_s]
    best = min(good, key=lambda one: (one.max_staleness, one.settled_step_s))
    return [best, *(one for one in by_speed if one is not best)]


def learner_sizes(request: Request, num_gpus: int) -> Iterator[int]:
    """Numbers of learner ranks that leave whole engines, fit into memory and have groups to train; beyond one machine
    in whole machines. Raises `ConfigError` where there is none."""
    config, per_node = request.config, request.config.placement.gpus_per_node or 8
    size = config.engine.tensor_parallel_size
    divides = [
        count
        for count in range(1, num_gpus - size + 1)
        if (num_gpus - count) % size == 0 and (num_gpus <= per_node or count % per_node == 0 or per_node % count == 0)
    ]
    if not divides:
        raise ConfigError(
            f"--gpus {num_gpus}: no room for a learner beside an engine of {size} GPUs; raise it, or lower "
            "engine.tensor_parallel_size"
        )
    learns = [count for count in divides if count <= config.groups_per_step]
    fits = [count for count in learns if learner_gib(request, count) <= request.gpu.memory_gib]
    if not fits:
        count = learns[-1] if learns else 1
        raise ConfigError(
            f"--gpus {num_gpus}: a rank of {count} needs about {learner_gib(request, count):.0f} of "
            f"{request.gpu.memory_gib:g} GiB; raise --gpus or groups_per_step, set learner.zero_stage to 3, "
            "learner.gradient_checkpointing or learner.lora.rank, or lower learner.micro_batch_tokens"
        )
    yield from fits


def learner_gib(request: Request, ranks: int) -> float:
    """What the estimate says of one of so many ranks."""
    config = request.config
    learner = replace(config.learner, num_ranks=ranks)
    return learner_memory(request.shape, learner, holds_reference=config.objective.kl_beta > 0).total / GIB


def estimated_step_s(scenario: Scenario) -> float:
    """Seconds of a step if its stages were even: the longest of them, or their sum where they take turns.

    An engine is lent whole groups, and a group is with it until its longest answer ends: of G sequences G * mean /
    longest are written in the mean. While weights come to it, it begins no group, so half of that time is lost to it.
    """
    rates = scenario.rates
    lengths = np.array(scenario.lengths.sample(np.random.default_rng(0), LENGTHS, scenario.group_size))
    mean, longest = float(lengths.mean()), float(lengths.max(axis=1).mean())
    completions = scenario.groups_per_step * scenario.group_size
    live = scenario.groups_per_step * (scenario.max_staleness + 1)
    engines = min(scenario.num_engines, live)  # a group is not divided
    held = min(scenario.groups_per_engine, live / engines) * scenario.group_size
    running = max(1, min(scenario.max_num_seqs, round(held * mean / longest)))
    generate_s = completions * mean * rates.decode_step_s[running] / running / engines
    generate_s += scenario.groups_per_step * rates.prefill_s / engines
    groups = -(-scenario.groups_per_step // scenario.learner_ranks)
    cost = scenario.prompt_tokens + int(scenario.group_size * mean)
    learn_s = rates.learner.seconds([cost] * groups, 1) + rates.publish_s
    turns = scenario.num_engines if rates.transfer_in_turn else 1
    sync_s = turns * rates.transfer_s + rates.pause_s
    judge_s = completions * rates.judge_latency_s / scenario.judge_calls
    judge_s = max(judge_s, scenario.groups_per_step * rates.score_s / scenario.num_reward_workers)
    if scenario.max_staleness == 0:
        return generate_s + judge_s + learn_s + sync_s
    return max(generate_s + rates.pause_s + rates.transfer_s / 2, learn_s + sync_s, judge_s)
