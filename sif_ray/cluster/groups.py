"""The groups of equal pods that a stage needs, worked out from its configuration alone. Pure.

GRPO: one group for each role of its layout, fixed. Warm-up: pods of equal shares of the ranks, fixed. The others: a
group for each pool of actors with GPUs, and one for everything on CPUs, which grow and shrink.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from sif_ray.config import (
    ConfigError,
    EvaluateConfig,
    GenerateConfig,
    GrpoConfig,
    ServeConfig,
    StageConfig,
    WarmupConfig,
)
from sif_ray.resources.plan import make_plan

GATEWAY_CPUS = 0.1  # of a gateway (sif_ray.serve.gateway)
TEACHER_CALLER_CPUS = 1.0  # of an actor that asks a teacher elsewhere (sif_ray.datagen.pipeline)
ENDPOINT_CPUS = 0.1  # of one that asks an endpoint (sif_ray.evaluate.answering)
ROW_CPUS = 1.5  # of a rank's share of the rows being read and encoded (sif_ray.learner.stream)


@dataclass(frozen=True)
class Group:
    """Equal pods.

    Example: `Group("rollout", 2, 2, num_cpus=10, num_gpus=8)` are two pods of 8 GPUs.
    """

    name: str
    fewest: int
    most: int
    num_cpus: int  # logical, that the pod must have at least
    num_gpus: int  # of the pod


@dataclass(frozen=True)
class Sizes:
    """What a configuration leaves open."""

    cpus_per_pod: int  # of pods without GPUs in autoscaled stages
    task_pods: int  # of those, beside what actors need
    gpus_per_pod: int  # of the warm-up, at most


@dataclass(frozen=True)
class _Pool:
    """Actors of one kind."""

    name: str
    key: str  # of the configuration, for messages
    fewest: int
    most: int
    num_cpus: float  # of one
    num_gpus: float


def groups_of(config: StageConfig, sizes: Sizes) -> list[Group]:
    """Raises `ConfigError` for a GRPO run that cannot be laid out and for actors that no pod can hold."""
    if isinstance(config, GrpoConfig):
        return _grpo(config)
    if isinstance(config, WarmupConfig):
        return _warmup(config, sizes)
    if isinstance(config, GenerateConfig | EvaluateConfig | ServeConfig):
        return _pooled(config, sizes)
    raise TypeError(f"{type(config).__name__} is not run on a cluster of its own")


def is_fixed(config: StageConfig) -> bool:
    """Whether all its pods must be there from the beginning to the end."""
    return isinstance(config, GrpoConfig | WarmupConfig)


def _grpo(config: GrpoConfig) -> list[Group]:
    layout = make_plan(config).layout
    pods = Counter(layout.roles)
    node = dict(zip(layout.roles, layout.nodes, strict=True))
    return [
        Group(
            role,
            count,
            count,
            num_cpus=math.ceil(sum(bundle.num_cpus for bundle in node[role])),
            num_gpus=int(sum(bundle.num_gpus for bundle in node[role])),
        )
        for role, count in pods.items()
    ]


def _warmup(config: WarmupConfig, sizes: Sizes) -> list[Group]:
    learner = config.learner
    if not learner.num_gpus_per_rank:
        return [Group("learner", 1, 1, math.ceil(learner.num_ranks * (learner.num_cpus_per_rank + ROW_CPUS)), 0)]
    ranks_per_gpu = math.floor(1 / learner.num_gpus_per_rank)
    gpus = math.ceil(learner.num_ranks / ranks_per_gpu)
    per_pod = max(count for count in range(1, sizes.gpus_per_pod + 1) if gpus % count == 0)
    ranks_per_pod = min(learner.num_ranks, per_pod * ranks_per_gpu)
    cpus = math.ceil(ranks_per_pod * (learner.num_cpus_per_rank + ROW_CPUS))
    return [Group("learner", gpus // per_pod, gpus // per_pod, cpus, per_pod)]


def _pooled(config: GenerateConfig | EvaluateConfig | ServeConfig, sizes: Sizes) -> list[Group]:
    pools = list(_pools(config))
    on_gpus = [_gpu_group(pool, config) for pool in pools if pool.num_gpus]
    return [*on_gpus, _cpu_group([pool for pool in pools if not pool.num_gpus], config, sizes)]


def _gpu_group(pool: _Pool, config: StageConfig) -> Group:
    gpus = math.ceil(pool.num_gpus)
    at_once = math.floor(1 / pool.num_gpus) if pool.num_gpus < 1 else 1  # actors in a pod
    fewest = math.ceil(pool.fewest / at_once) if isinstance(config, ServeConfig) else 0
    most = math.ceil(pool.most * _surge(config) / at_once)
    return Group(pool.name, fewest, most, math.ceil(at_once * pool.num_cpus), gpus)


def _cpu_group(pools: list[_Pool], config: StageConfig, sizes: Sizes) -> Group:
    room = sizes.cpus_per_pod
    for pool in pools:
        if pool.num_cpus > room:
            raise ConfigError(
                f"{pool.key} = {pool.num_cpus:g} logical CPUs exceed the {room} of a pod; raise cpu.cpus of the "
                "cluster file or lower it"
            )

    def pods(actors: str, factor: float) -> int:
        at_once = {pool.name: math.floor(room / pool.num_cpus) for pool in pools}
        return math.ceil(sum(factor * getattr(pool, actors) / at_once[pool.name] for pool in pools))

    fewest = max(1, pods("fewest", 1)) if isinstance(config, ServeConfig) else 0
    most = pods("most", _surge(config)) + (0 if isinstance(config, ServeConfig) else sizes.task_pods)
    return Group("cpu", fewest, max(fewest, most), room, 0)


def _surge(config: StageConfig) -> float:
    """Replicas of two versions at a time, while a new one is rolled out."""
    return 1 + config.max_surge_percent / 100 if isinstance(config, ServeConfig) else 1


def _pools(config: GenerateConfig | EvaluateConfig | ServeConfig) -> Iterator[_Pool]:
    if not isinstance(config, EvaluateConfig) or config.benchmarks:  # a dataset has its depth
        yield _Pool(
            "depth",
            "depth_num_cpus",
            config.depth_actors_min,
            config.depth_actors_max,
            config.depth_num_cpus,
            config.depth_num_gpus,
        )
    if isinstance(config, GenerateConfig):
        yield from _teachers(config)
        return
    engine = config.engine
    if isinstance(config, ServeConfig) or config.checkpoints:
        yield _Pool("engine", "engine.num_cpus", config.actors_min, config.actors_max, engine.num_cpus, engine.num_gpus)
    if isinstance(config, ServeConfig):
        yield _Pool("gateway", "gateways", config.gateways, config.gateways, GATEWAY_CPUS, 0.0)
    elif config.endpoints:
        yield _Pool("caller", "endpoints", config.actors_min, config.actors_max, ENDPOINT_CPUS, 0.0)


def _teachers(config: GenerateConfig) -> Iterator[_Pool]:
    teacher = config.teacher
    if teacher.kind == "vllm":
        cpus, gpus = teacher.engine.num_cpus, teacher.engine.num_gpus
        yield _Pool("teacher", "teacher.engine.num_cpus", teacher.actors_min, teacher.actors_max, cpus, gpus)
    elif teacher.kind == "llm":
        yield _Pool("teacher", "teacher", teacher.actors_min, teacher.actors_max, TEACHER_CALLER_CPUS, 0.0)
