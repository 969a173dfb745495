"""The suite `cost`: how the cost of the parts of a run grows with its sizes.

From one small point, one size at a time grows: the policy's parameters, the rollouts of a group, engines, learner
ranks, open tickets. Every point starts real engines and learner ranks, has groups written, trains on them and brings
the new weights to the engines; policies have random weights, and rewards are drawn by chance, since only the work
matters. Costs are seconds of work that grows in proportion to the size, so that an exponent of 1 is linear growth:

    parameters      seconds per written token, per trained token, and of a weight update
    group size      seconds per group: written, trained, scored
    engines         seconds to write so many times the groups, and of a weight update of all of them
    learner ranks   seconds to train so many times the groups
    open tickets    seconds of the ledger to bring each of them to its end

Engines and ranks share the cores of one machine: with fewer cores than processes their seconds add up, which is linear;
more than that is lost by the system. Policies that are too small to keep a core busy cost less than their share, so
exponents below 1 are no finding. The figure has costs in units of the smallest size's.
"""

from __future__ import annotations

import asyncio
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sif_ray.bench import reward
from sif_ray.bench.findings import Findings, Goal
from sif_ray.bench.rollout import generate
from sif_ray.bench.toy_dataset import toy_samples
from sif_ray.config import EngineConfig, GrpoConfig, LearnerConfig, ObjectiveConfig, SamplingConfig
from sif_ray.learner.actor import LearnerGroup
from sif_ray.loop.requests import groups_per_engine, training_request
from sif_ray.loop.workers import ActorFactory
from sif_ray.observe.loglog import COLOURS, GREY, Curve, loglog_svg
from sif_ray.policy.random_policy import write_random_policy
from sif_ray.records import RolloutGroup, ScoredGroup
from sif_ray.resources.shapes import PolicyShape
from sif_ray.rollout.actor import RolloutActor
from sif_ray.runtime import ray_session

log = logging.getLogger(__name__)

LINEAR = 1.15  # an exponent above it is worse than linear

TINY = PolicyShape(160, 4, 5, 5, 320, 588, False, 96, 3, 3, 192)  # the toy policy


@dataclass(frozen=True)
class Load:
    """The smallest point, and the multiples of each size that are measured."""

    groups: int = 16  # per engine and rank
    group_size: int = 4
    max_tokens: int = 64
    widths: tuple[int, ...] = (1, 2, 4)  # of every layer: parameters grow with the square
    group_sizes: tuple[int, ...] = (1, 2, 4)
    engines: tuple[int, ...] = (1, 2)
    ranks: tuple[int, ...] = (1, 2)
    tickets: tuple[int, ...] = (1_000, 10_000, 100_000)
    traces: int = 1_000


@dataclass(frozen=True)
class Point:
    """What was measured at one size."""

    parameters: int
    rollout_s: float
    rollout_tokens: int
    learner_s: float
    learner_tokens: int
    sync_s: float
    prompt_tokens: int  # of the groups, each counted once

    @property
    def rollout_tokens_per_s(self) -> float:
        return self.rollout_tokens / self.rollout_s

    @property
    def learner_tokens_per_s(self) -> float:
        return self.learner_tokens / self.learner_s


def measure(repetitions: int, load: Load = Load()) -> Findings:
    """All sizes, the smallest point once; at each the medians of `repetitions` rounds."""
    with tempfile.TemporaryDirectory(prefix="sif_ray-bench-") as name:
        policies = {width: write_policy(Path(name) / f"width-{width}", width) for width in load.widths}
        config = config_of(policies[load.widths[0]], load)
        sizes = _configs(config, load, policies)
        found = {size: _median(measure_point(changed, repetitions)) for size, changed in sizes.items()}
    costs = _costs(found, load) | _reward_costs(load) | _ledger_costs(load)
    exponents = {name: exponent(by_size) for name, by_size in costs.items()}
    goals = [Goal(f"exponent of {name}", value, LINEAR, at_least=False) for name, value in exponents.items()]
    for name, by_size in costs.items():
        row = "  ".join(f"{size:g}: {cost:.3g} s" for size, cost in by_size.items())
        log.info("bench cost: %s ~ size^%.2f   %s", name, exponents[name], row)
    figures = {
        "load": asdict(load),
        "points": [{"size": name, "times": factor, **_row(point)} for (name, factor), point in found.items()],
        "seconds": {name: {f"{size:g}": cost for size, cost in by_size.items()} for name, by_size in costs.items()},
        "exponents": exponents,
    }
    return Findings(goals, figures, _svg(costs))


def write_policy(folder: Path, width: int) -> str:
    """Random weights, every layer so many times as wide as the toy policy's, heads as wide as there."""
    shape = replace(
        TINY,
        **{
            name: getattr(TINY, name) * width
            for name in ("hidden", "heads", "kv_heads", "mlp", "vision_hidden", "vision_heads", "vision_mlp")
        },
    )
    write_random_policy(shape, folder, tokenizer="toy")
    return str(folder)


def config_of(policy: str, load: Load) -> GrpoConfig:
    """The smallest point; engines have room for every rollout at its largest."""
    return GrpoConfig(
        policy=policy,
        group_size=load.group_size,
        groups_per_step=load.groups,
        sampling=SamplingConfig(max_tokens=load.max_tokens),
        objective=ObjectiveConfig(kl_beta=0.0),
        engine=EngineConfig(max_model_len=256, max_num_seqs=32, kv_cache_gib=0.25, num_cpus=0.5),
        learner=LearnerConfig(num_cpus_per_rank=0.5, micro_batch_tokens=4096),
    )


# --- one point -------------------------------------------------------------------------------------------------------


def measure_point(config: GrpoConfig, repetitions: int) -> list[Point]:
    """Engines and ranks of `config` at work on `groups_per_step` groups for each of them, in so many rounds and one
    before them that warms up."""

    def make(name: str) -> Any:
        options = {"num_cpus": config.engine.num_cpus, "num_gpus": config.engine.num_gpus}
        seed = config.seed + int(name.split()[-1])
        actor = RolloutActor.options(**options)
        return actor.remote(
            config.policy, config.engine, config.prompt, max_pixels=config.max_pixels, seed=seed, engine_id=name
        )

    async def work() -> list[Point]:
        factory, learner = ActorFactory(make, start="start", shutdown="shutdown"), LearnerGroup(config)
        names = [f"engine {number}" for number in range(config.num_engines)]
        try:
            starts = asyncio.gather(*map(factory.start, names))
            if config.placement.colocate:  # an engine that starts measures what is free of its GPU
                await starts
            engines, _ = await asyncio.gather(starts, learner.start(total_steps=1 + repetitions))
            try:
                rounds = [await _round(config, engines, learner, version) for version in range(1 + repetitions)]
                return rounds[1:]
            finally:
                await asyncio.gather(*map(factory.end, engines))
        finally:
            learner.shutdown()

    with ray_session(config.ray):
        points = asyncio.run(work())
    log.info("bench cost: %s", _row(_median(points)))
    return points


async def _round(config: GrpoConfig, engines: Sequence[Any], learner: LearnerGroup, version: int) -> Point:
    samples = list(toy_samples(config.groups_per_step * max(config.num_engines, config.learner.num_ranks)))
    requests = [training_request(config, sample, f"{version}-{sample.sample_id}") for sample in samples]
    to_write = requests[: config.groups_per_step * config.num_engines]
    started_s = time.perf_counter()
    shares = await asyncio.gather(
        *(
            generate(
                engine,
                to_write[number :: len(engines)],
                groups_per_engine(config.engine.max_num_seqs, config.group_size),
            )
            for number, engine in enumerate(engines)
        )
    )
    written_s = time.perf_counter()
    groups = [group for share in shares for group in share]
    size = config.groups_per_step * config.learner.num_ranks
    batch = [_scored(groups[index % len(groups)], index) for index in range(size)]
    training_s = time.perf_counter()
    metrics = await learner.train(batch, version)
    trained_s = time.perf_counter()
    update = await learner.publish(version + 1)
    receipts = await asyncio.gather(*(engine.update_weights(update) for engine in engines))
    synced_s = time.perf_counter()
    if {receipt.checksum for receipt in receipts} != {update.checksum}:
        raise RuntimeError("an engine's receipt is not that of the published weights")
    tokens, trained = sum(group.num_tokens for group in groups), sum(scored.group.num_tokens for scored in batch)
    if metrics["trained_tokens"] != trained:
        raise RuntimeError(f"the learner trained on {metrics['trained_tokens']:g} of {trained} tokens")
    parameters = sum(math.prod(tensor.shape) for tensor in update.tensors)
    prompts = sum(len(scored.group.prompt_token_ids_P) for scored in batch)
    return Point(
        parameters, written_s - started_s, tokens, trained_s - training_s, trained, synced_s - trained_s, prompts
    )


def _scored(group: RolloutGroup, seed: int) -> ScoredGroup:
    rewards_G = np.random.default_rng(seed).random(len(group.rollouts), np.float32)
    return ScoredGroup(group, rewards_G, {})


# --- how it grows ----------------------------------------------------------------------------------------------------

Size = tuple[str, int]
"""Which size has grown, and how many times it is the smallest."""
Costs = dict[str, dict[float, float]]
"""Seconds by what costs them and by size."""


def _configs(config: GrpoConfig, load: Load, policies: Mapping[int, str]) -> dict[Size, GrpoConfig]:
    grown: dict[Size, GrpoConfig] = {("smallest", 1): config}
    for width in load.widths[1:]:
        grown["width", width] = replace(config, policy=policies[width])
    for factor in load.group_sizes[1:]:
        grown["group size", factor] = replace(config, group_size=config.group_size * factor)
    for number in load.engines[1:]:
        grown["engines", number] = replace(config, num_engines=number)
    for number in load.ranks[1:]:
        grown["learner ranks", number] = replace(config, learner=replace(config.learner, num_ranks=number))
    return grown


def _costs(found: Mapping[Size, Point], load: Load) -> Costs:
    smallest = found["smallest", 1]

    def along(name: str, factors: Sequence[int]) -> dict[int, Point]:
        return {1: smallest} | {factor: found[name, factor] for factor in factors[1:]}

    by_width = along("width", load.widths).values()
    by_group = {load.group_size * factor: point for factor, point in along("group size", load.group_sizes).items()}
    by_engines, by_ranks = along("engines", load.engines), along("learner ranks", load.ranks)
    return {
        "a written token, by parameters": {p.parameters: p.rollout_s / p.rollout_tokens for p in by_width},
        "a trained token, by parameters": {p.parameters: p.learner_s / p.learner_tokens for p in by_width},
        "a weight update, by parameters": {p.parameters: p.sync_s for p in by_width},
        "a written group, by group size": {size: p.rollout_s / load.groups for size, p in by_group.items()},
        "a trained group, by group size": {size: p.learner_s / load.groups for size, p in by_group.items()},
        "writing, by engines": {number: point.rollout_s for number, point in by_engines.items()},
        "a weight update, by engines": {number: point.sync_s for number, point in by_engines.items()},
        "training, by learner ranks": {number: point.learner_s for number, point in by_ranks.items()},
    }


def _reward_costs(load: Load) -> Costs:
    sizes = [load.group_size * factor for factor in load.group_sizes]
    seconds = {}
    for size in sizes:
        findings = reward.measure_traces(1, reward.Load(traces=load.traces, group_size=size))
        seconds[size] = size / findings.figures["traces_per_s"]["worker"]["median"]
    return {"a scored group, by group size": seconds}


def _ledger_costs(load: Load) -> Costs:
    trained = reward.Load().rounds * max(load.tickets)  # for every size, as few take too short to be measured
    seconds = {number: number / reward.ledger_rate(number, trained // number) for number in load.tickets}
    return {"transitions of every ticket, by open tickets": seconds}


def exponent(by_size: Mapping[float, float]) -> float:
    """The slope of the straight line through the costs, both axes logarithmic."""
    slope, _ = np.polyfit(np.log(list(by_size)), np.log(list(by_size.values())), 1)
    return float(slope)


def _median(points: Sequence[Point]) -> Point:
    return replace(
        points[0],
        **{name: statistics.median(getattr(p, name) for p in points) for name in ("rollout_s", "learner_s", "sync_s")},
    )


def _row(point: Point) -> dict[str, float]:
    rates = {"rollout_tokens_per_s": point.rollout_tokens_per_s, "learner_tokens_per_s": point.learner_tokens_per_s}
    return {"parameters": point.parameters, **rates, "sync_s": point.sync_s}


def _svg(costs: Costs) -> str:
    curves = []
    for (name, by_size), colour in zip(costs.items(), COLOURS, strict=True):
        first_size, first_cost = next(iter(by_size.items()))
        sizes, values = [size / first_size for size in by_size], [cost / first_cost for cost in by_size.values()]
        curves.append(Curve(name, sizes, values, colour))
    largest = max(size for curve in curves for size in curve.sizes)
    linear = Curve("linear", [1, largest], [1, largest], GREY, dashes="3 4", dots=False)
    return loglog_svg("Cost of a run's parts", "size, of the smallest", [linear, *curves])
