"""Generation and update at once: two processes that do nothing else, without Ray or a loop between them.

What they take from each other (caches, memory, cores) no order of the work can give back.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from threading import Barrier

from sif_ray.bench.cpu import CpuWatch
from sif_ray.bench.lone_stages import Lone, groups_at_once, make_learner
from sif_ray.config import GrpoConfig
from sif_ray.loop.requests import training_request
from sif_ray.records import Sample, ScoredGroup
from sif_ray.rollout.engine import RolloutEngine
from sif_ray.rollout.request import RolloutRequest

START_TIMEOUT_S = 180.0


def measure_at_once(
    config: GrpoConfig, samples: Sequence[Sample], batches: Sequence[Sequence[ScoredGroup]], seconds: float
) -> tuple[Lone, Lone]:
    """Generation from `samples` and updates on `batches`, again and again, for `seconds`."""
    spawn = multiprocessing.get_context("spawn")
    with spawn.Manager() as manager, ProcessPoolExecutor(2, spawn) as processes:
        ready = manager.Barrier(2, timeout=START_TIMEOUT_S)
        generation = processes.submit(_generate_for, config, samples, ready, seconds)
        update = processes.submit(_update_for, config, batches, ready, seconds)
        for ended in as_completed((generation, update)):
            ended.result()  # raises what went wrong first, not that the other one waited in vain
        return generation.result(), update.result()


def _generate_for(config: GrpoConfig, samples: Sequence[Sample], ready: Barrier, seconds: float) -> Lone:
    return asyncio.run(_generate(config, samples, ready, seconds))


async def _generate(config: GrpoConfig, samples: Sequence[Sample], ready: Barrier, seconds: float) -> Lone:
    engine = RolloutEngine(config.policy, config.engine, config.prompt, max_pixels=config.max_pixels, seed=config.seed)
    await engine.start()
    try:
        await engine.warm_up()
        later = itertools.cycle(samples)
        first = itertools.islice(later, config.groups_per_step)
        await asyncio.gather(*(engine.generate(_request(config, sample)) for sample in first))
        ready.wait()
        with CpuWatch() as watch:
            begin_s, ended_s = time.time(), []

            async def one_after_another() -> None:
                while time.time() < begin_s + seconds:
                    await engine.generate(_request(config, next(later)))
                    ended_s.append(time.time())

            await asyncio.gather(*(one_after_another() for _ in range(groups_at_once(config))))
        return finished_while_both_worked(watch, begin_s, seconds, ended_s, config.group_size)
    finally:
        await engine.shutdown()


def _update_for(config: GrpoConfig, batches: Sequence[Sequence[ScoredGroup]], ready: Barrier, seconds: float) -> Lone:
    learner = make_learner(config, total_steps=10**6)
    try:
        learner.train_step(batches[0], 0)
        ready.wait()
        with CpuWatch() as watch:
            begin_s, ended_s = time.time(), []
            for version, batch in enumerate(itertools.cycle(batches), start=1):
                learner.train_step(batch, version)
                ended_s.append(time.time())
                if ended_s[-1] >= begin_s + seconds:
                    break
        return finished_while_both_worked(watch, begin_s, seconds, ended_s, len(batches[0]) * config.group_size)
    finally:
        learner.close()


def finished_while_both_worked(
    watch: CpuWatch, begin_s: float, seconds: float, ended_s: Sequence[float], each: int
) -> Lone:
    """The cost of what ended within `seconds` of `begin_s`. `each` is the completions of one of `ended_s`."""
    within_s = [end_s for end_s in ended_s if end_s <= begin_s + seconds]
    if not within_s:
        raise RuntimeError(f"nothing ended within {seconds:g} s")
    completions, taken_s = len(within_s) * each, within_s[-1] - begin_s
    return Lone(taken_s / completions, watch.cores(begin_s, within_s[-1]) * taken_s / completions)


def _request(config: GrpoConfig, sample: Sample) -> RolloutRequest:
    return training_request(config, sample, sample.sample_id)
