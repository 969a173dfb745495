"""The suite `sync`: a weight update from the learner to the receipt of an engine, by size of the policy.

A learner rank and a vLLM engine, each in its actor as in the loop, hold the same policy of random weights, of the
structure of Qwen2.5-VL. One update is `publish` on the learner, the Ray object store, `update_weights` on the engine,
the receipt. It stands beside a plain copy of as many bytes into fresh memory in this process, in turns. Every receipt
must name the bytes and the checksum that were published, and as many bytes as the checkpoint has weights.

The pause is the part of an update in which nothing is generated. Its share of a step is that of a policy of the toy
policy's size under the quickstart's settings, which writes as many tokens as a warmed-up policy does there: the longest
pause over a step measured in the same run, which is the longer of generating and training its groups, as both overlap.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray

from sif_ray.bench.answering_policy import write_answering_policy
from sif_ray.bench.findings import Findings, Goal, interleaved, spread
from sif_ray.config import (
    EngineConfig,
    GrpoConfig,
    LearnerConfig,
    ObjectiveConfig,
    PromptConfig,
    RayConfig,
    SamplingConfig,
)
from sif_ray.learner.actor import LearnerGroup
from sif_ray.policy.random_policy import write_random_policy
from sif_ray.records import ScoredGroup
from sif_ray.resources.shapes import PolicyShape
from sif_ray.rollout.actor import RolloutActor
from sif_ray.rollout.engine import RolloutRequest
from sif_ray.rollout.weights import Receipt, WeightUpdate
from sif_ray.runtime import ray_session
from sif_ray.toyworld.questions import draw_questions
from sif_ray.toyworld.render import png, render
from sif_ray.toyworld.scenes import make_scene

log = logging.getLogger(__name__)

TIMES_OF_COPY = 3.0
PAUSE_SHARE = 0.02

MEMORY_PER_BYTE = (
    7  # of the policy: learner, two versions in the object store, staged, the engine's own and its packing
)
MEMORY_GIB = 5.0  # of the processes beside


def shape(hidden: int, layers: int) -> PolicyShape:
    """A policy whose language model has 10 * layers * hidden^2 weights, about."""
    return PolicyShape(hidden, layers, hidden // 64, hidden // 64, 2 * hidden, 600, False, 96, 2, 3, 192)


@dataclass(frozen=True)
class Load:
    """How much work."""

    shapes: tuple[PolicyShape, ...] = (shape(256, 5), shape(768, 6), shape(1024, 12), shape(2048, 12))
    groups: int = 24  # of a step of the quickstart
    group_size: int = 8
    max_tokens: int = 64  # of every completion: the quickstart's mean after its warm-up
    max_num_seqs: int = 128


def measure(repetitions: int, load: Load = Load()) -> Findings:
    """Every size that fits into memory, then the step."""
    largest = max(shape.num_parameters for shape in load.shapes) * 4
    store_mib = int(2.5 * largest / 2**20) + 256
    with tempfile.TemporaryDirectory(prefix="sif_ray-bench-") as name, _local(store_mib):
        sizes = [size for shape in load.shapes if (size := measure_size(Path(name), shape, repetitions))]
        step = measure_step(write_answering_policy(Path(name) / "answering"), load, repetitions)
    goals = [
        Goal(f"sync of {size['mb']:.0f} MB, times of a copy", size["times_of_copy"], TIMES_OF_COPY, False)
        for size in sizes
    ]
    goals.append(Goal("pause, share of a toy step", step["pause_share"], PAUSE_SHARE, at_least=False))
    return Findings(goals, {"sizes": sizes, "step": step, "load": asdict(load)})


def measure_size(folder: Path, shape: PolicyShape, repetitions: int) -> dict[str, Any] | None:
    """Updates and copies of one size; None where the machine has no room for it."""
    num_bytes = 4 * shape.num_parameters
    needed, free = MEMORY_PER_BYTE * num_bytes + MEMORY_GIB * 2**30, psutil.virtual_memory().available
    if needed > free:
        log.warning("bench sync: %.0f MB left out, it needs %.1f GiB of memory", num_bytes / 1e6, needed / 2**30)
        return None
    policy = str(folder / f"policy-{shape.hidden}")
    write_random_policy(shape, policy, tokenizer="toy")
    source = np.ones(num_bytes, np.uint8)
    config = GrpoConfig(
        policy=policy,
        engine=EngineConfig(max_model_len=256, max_num_seqs=4, kv_cache_gib=0.25),
        learner=LearnerConfig(zero_stage=0),
    )
    with _pair(config) as pair:
        pair.sync(num_bytes)  # the first one opens files and connections
        works: dict[str, Callable[[], Any]] = {"sync": partial(pair.sync, num_bytes), "copy": partial(_copy_s, source)}
        found = interleaved(works, repetitions)
    seconds = [sync.seconds for sync in found["sync"]]
    times = statistics.median(seconds) / statistics.median(found["copy"])
    log.info("bench sync: %.0f MB, %.2f s, %.1f times a copy", num_bytes / 1e6, statistics.median(seconds), times)
    return {
        "mb": num_bytes / 1e6,
        "bytes": num_bytes,
        "times_of_copy": times,
        "gb_per_s": num_bytes / 1e9 / statistics.median(seconds),
        "copy_gb_per_s": num_bytes / 1e9 / statistics.median(found["copy"]),
        "sync_s": spread(seconds),
        "copy_s": spread(found["copy"]),
        "publish_s": spread([sync.publish_s for sync in found["sync"]]),
        "transfer_s": spread([sync.receipt.seconds - sync.receipt.pause_s for sync in found["sync"]]),
        "pause_s": spread([sync.receipt.pause_s for sync in found["sync"]]),
    }


@dataclass(frozen=True)
class Sync:
    """One update."""

    seconds: float
    publish_s: float
    receipt: Receipt


class Pair:
    """A learner and an engine with the same policy."""

    def __init__(self, learner: LearnerGroup, engine: Any) -> None:
        self.learner, self.engine, self.version = learner, engine, 0

    def sync(self, num_bytes: int) -> Sync:
        """Publish the learner's weights as the next version and bring the engine to it."""
        self.version += 1
        started_s = time.perf_counter()
        update: WeightUpdate = asyncio.run(self.learner.publish(self.version))
        published_s = time.perf_counter()
        receipt: Receipt = ray.get(self.engine.update_weights.remote(update))
        ended_s = time.perf_counter()
        wanted = (self.version, len(update.tensors), num_bytes, update.checksum)
        found = (receipt.version, receipt.num_tensors, receipt.num_bytes, receipt.checksum)
        if found != wanted:
            raise RuntimeError(f"the receipt says (version, tensors, bytes, checksum) = {found}, wanted are {wanted}")
        return Sync(ended_s - started_s, published_s - started_s, receipt)


@contextmanager
def _pair(config: GrpoConfig) -> Iterator[Pair]:
    engine = RolloutActor.options(num_cpus=0).remote(config.policy, config.engine, PromptConfig())
    learner = LearnerGroup(config, lambda name: {"num_cpus": 0})
    try:
        asyncio.run(learner.start(total_steps=1000))
        ray.get(engine.start.remote())
        yield Pair(learner, engine)
        ray.get(engine.shutdown.remote())
    finally:
        learner.shutdown()
        ray.kill(engine)


@contextmanager
def _local(store_mib: int) -> Iterator[None]:
    with ray_session(RayConfig(num_cpus=2, object_store_mib=store_mib)):
        yield


def _copy_s(source: np.ndarray) -> float:
    started_s = time.perf_counter()
    copied = source.copy()
    seconds = time.perf_counter() - started_s
    if copied[-1] != source[-1]:
        raise RuntimeError("the copy is none")
    return seconds


def measure_step(policy: str, load: Load, repetitions: int) -> dict[str, Any]:
    """Pause of a policy's updates beside its step under the settings of the quickstart."""
    config = GrpoConfig(
        policy=policy,
        objective=ObjectiveConfig(kl_beta=0.0),
        engine=EngineConfig(max_model_len=512, max_num_seqs=load.max_num_seqs, kv_cache_gib=0.5),
    )
    rng = np.random.default_rng(0)
    steps, pauses = [], []
    with _pair(config) as pair:
        for _ in range(repetitions):
            started_s = time.perf_counter()
            groups = ray.get([pair.engine.generate.remote(request) for request in _requests(load)])
            generated_s = time.perf_counter()
            scored = [ScoredGroup(group, rng.random(load.group_size).astype(np.float32), {}) for group in groups]
            asyncio.run(pair.learner.train(scored, pair.version))
            steps.append(max(generated_s - started_s, time.perf_counter() - generated_s))
            update = asyncio.run(pair.learner.publish(pair.version + 1))
            pair.version += 1
            pauses.append(ray.get(pair.engine.update_weights.remote(update)).pause_s)
    share = max(pauses) / statistics.median(steps)
    return {"pause_share": share, "pause_s": spread(pauses), "step_s": spread(steps)}


def _requests(load: Load) -> list[RolloutRequest]:
    requests = []
    for seed in range(load.groups):
        scene = make_scene(seed)
        photo = png(render(scene).rgb)
        sampling = SamplingConfig(temperature=1.0, max_tokens=load.max_tokens)
        question = draw_questions(scene, 1)[0].text
        requests.append(
            RolloutRequest(f"bench-{seed}", "bench", question, (photo, photo), load.group_size, sampling, seed=seed)
        )
    return requests
