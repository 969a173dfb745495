"""What a run needs of machines, files and services, read off its configuration. No torch, no Ray."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from sif_ray.config import (
    EndpointConfig,
    EngineConfig,
    EvaluateConfig,
    GenerateConfig,
    GrpoConfig,
    LearnerConfig,
    QuickstartConfig,
    ServeConfig,
    StageConfig,
    WarmupConfig,
)
from sif_ray.quickstart import with_paths
from sif_ray.resources.memory import GIB, PROCESS_BYTES, learner_memory
from sif_ray.resources.object_store import MIB, groups_bytes, weights_bytes
from sif_ray.resources.shapes import find_shape

LOCAL = "local"  # the address of a run that starts a cluster of its own
TOY = "toy"
RAY_BYTES = GIB // 2  # Ray's own processes
ENGINE_BYTES = 3 * GIB // 2  # of a vLLM engine beside weights and cache


@dataclass(frozen=True)
class GpuNeed:
    """Of all engines, ranks and depth models together."""

    count: float = 0.0
    per_node: int = 0  # 0 = wherever they are
    nodes: int = 1
    memory_gib: float = 0.0  # of each; 0 = not stated
    bfloat16: bool = False


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible API. Example: `Endpoint("judge", "judge", "http://judge-host:8000/v1", "JUDGE_API_KEY")`."""

    field: str
    model: str
    base_url: str
    api_key_env: str


@dataclass(frozen=True)
class Place:
    """A path, URL or hub id, and the key of the configuration that names it."""

    field: str
    place: str


@dataclass(frozen=True)
class Policy(Place):
    engine_on_cpu: bool = False


@dataclass(frozen=True)
class Dataset(Place):
    splits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Need:
    """The empty one is that of a machine without a request."""

    address: str = LOCAL  # of Ray
    extras: frozenset[str] = frozenset()  # of pyproject.toml
    engine: bool = False  # vLLM is started
    policies: tuple[Policy, ...] = ()
    adapters: tuple[Place, ...] = ()  # LoRA
    depth_models: tuple[Place, ...] = ()
    datasets: tuple[Dataset, ...] = ()
    inputs: tuple[Place, ...] = ()  # files and folders that are read
    outputs: tuple[Place, ...] = ()  # folders that are written
    endpoints: tuple[Endpoint, ...] = ()
    key_variables: tuple[tuple[str, str], ...] = ()  # (key of the configuration, environment variable)
    trackers: tuple[str, ...] = ()
    gpus: GpuNeed = field(default_factory=GpuNeed)
    cpus: float = 0.0  # logical, of Ray
    local_cpus: int = 0  # logical, of the cluster that a run starts for itself; 0 = it joins one
    threads: int = 0  # that compute on a machine without GPUs
    memory_bytes: int = 0  # of the machine that starts a cluster of its own, at least
    store_mib: int = 0  # Ray's object store of that cluster
    store_bytes: int = 0  # that a run puts into an object store at most, where that is known

    @property
    def is_local(self) -> bool:
        """Whether there is one machine, this one."""
        return self.address == LOCAL


def need_of(config: StageConfig) -> Need:
    """What a run of `config` needs."""
    need = _NEEDS[type(config)](config)
    need = replace(need, address=config.ray.cluster)
    if not need.is_local:
        return need
    store = config.ray.object_store_mib
    memory = need.memory_bytes + RAY_BYTES + store * MIB
    return replace(need, store_mib=store, memory_bytes=memory, local_cpus=config.ray.local_cpus)


def _of_generate(config: GenerateConfig) -> Need:
    teacher = config.teacher
    local_teacher = teacher.kind == "vllm"
    gpus = config.depth_actors_min * config.depth_num_gpus
    gpus += teacher.actors_min * teacher.engine.num_gpus if local_teacher else 0
    cpus = 1.0 + (0 if config.depth_num_gpus else config.depth_actors_min * config.depth_num_cpus)
    endpoints = [("teacher", teacher)] if teacher.kind == "llm" else []
    endpoints += [("judge", config.judge)] if teacher.kind != "template" and config.judge.is_called else []
    return Need(
        engine=local_teacher,
        depth_models=(Place("depth_model", config.depth_model),),
        outputs=(Place("output", config.output), *_optional("depth_cache", config.depth_cache)),
        gpus=GpuNeed(gpus),
        cpus=cpus,
        threads=0 if gpus else 1,
        **_endpoints(endpoints),
    )


def _of_warmup(config: WarmupConfig) -> Need:
    learner = config.learner
    return Need(
        policies=(Policy("policy", config.policy),),
        adapters=_optional("learner.lora.adapter", learner.lora.adapter),
        datasets=(Dataset("data", config.data, (config.split,)),),
        outputs=(Place("output", config.output),),
        gpus=GpuNeed(learner.num_ranks * learner.num_gpus_per_rank, bfloat16=learner.dtype == "bfloat16"),
        cpus=learner.num_ranks * learner.num_cpus_per_rank,
        threads=_learner_threads(learner),
        memory_bytes=_learner_bytes(config.policy, learner, holds_reference=False),
    )


def _of_grpo(config: GrpoConfig) -> Need:
    learner, engine, placement = config.learner, config.engine, config.placement
    engine_gpus, learner_gpus = config.num_engines * engine.num_gpus, learner.num_ranks * learner.num_gpus_per_rank
    shape, _ = find_shape(config.policy)
    return Need(
        engine=True,
        policies=(Policy("policy", config.policy, engine_on_cpu=not engine.num_gpus),),
        adapters=_optional("learner.lora.adapter", learner.lora.adapter),
        datasets=(Dataset("data", config.data, (config.split, *([config.eval_split] if config.eval_every else []))),),
        outputs=(Place("output", config.output),),
        trackers=tuple(config.trackers),
        gpus=GpuNeed(
            learner.num_ranks if placement.colocate else engine_gpus + learner_gpus,
            placement.gpus_per_node,
            placement.nodes,
            placement.gpu_memory_gib if placement.gpus_per_node else 0.0,
            bfloat16=engine.num_gpus > 0 or learner.dtype == "bfloat16",
        ),
        cpus=learner.num_ranks * learner.num_cpus_per_rank
        + config.num_engines * engine.num_cpus
        + config.num_reward_workers,
        threads=_learner_threads(learner) + _engine_threads(engine, config.num_engines),
        memory_bytes=_learner_bytes(config.policy, learner, holds_reference=config.objective.kl_beta > 0)
        + _engine_bytes(config.policy, engine, config.num_engines),
        store_bytes=weights_bytes(config, shape.num_parameters if shape else 0) + groups_bytes(config, samples=()),
        **_endpoints([("judge", config.judge)] if config.judge.is_called else []),
    )


def _of_evaluate(config: EvaluateConfig) -> Need:
    engine = config.engine
    uses_engine = bool(config.checkpoints) and config.backend == "vllm"
    number = config.actors_min if config.checkpoints else 0
    policies = [
        Policy(f"checkpoints.{name}", place, engine_on_cpu=not engine.num_gpus)
        for name, place in config.checkpoints.items()
    ]
    files = [
        (f"benchmarks.{name}.{key}", getattr(benchmark, key))
        for name, benchmark in config.benchmarks.items()
        for key in ("annotations", "images", "answers")
    ]
    endpoints: list[tuple[str, EndpointConfig]] = [(f"endpoints.{name}", at) for name, at in config.endpoints.items()]
    endpoints += [("judge", config.judge)] if config.judge.is_called else []
    return Need(
        engine=uses_engine,
        policies=tuple(policies),
        depth_models=(Place("depth_model", config.depth_model),) if config.benchmarks else (),
        datasets=(Dataset("data", config.data, (config.split,)),) if config.data else (),
        inputs=tuple(Place(key, place) for key, place in files if place not in ("", TOY)),
        outputs=(Place("output", config.output), *_optional("depth_cache", config.depth_cache)),
        gpus=GpuNeed(number * engine.num_gpus, bfloat16=engine.num_gpus > 0),
        cpus=0.0 if engine.num_gpus else number * engine.num_cpus,
        threads=_engine_threads(engine, number),
        memory_bytes=max((_engine_bytes(policy.place, engine, number) for policy in policies), default=0),
        **_endpoints(endpoints),
    )


def _of_serve(config: ServeConfig) -> Need:
    engine = config.engine
    gpus = config.actors_min * engine.num_gpus + config.depth_actors_min * config.depth_num_gpus
    variables = (("api_keys_env", config.api_keys_env),) if config.api_keys_env else ()
    return Need(
        extras=frozenset({"serve"}),
        engine=True,
        policies=(Policy("policy", config.policy, engine_on_cpu=not engine.num_gpus),),
        adapters=tuple(Place(f"adapters.{name}", place) for name, place in config.adapters.items()),
        depth_models=(Place("depth_model", config.depth_model),),
        inputs=_optional("api_keys_file", config.api_keys_file),
        outputs=_optional("depth_cache", config.depth_cache),
        key_variables=variables,
        gpus=GpuNeed(gpus, bfloat16=engine.num_gpus > 0),
        cpus=config.actors_min * engine.num_cpus + config.depth_actors_min * config.depth_num_cpus + config.gateways,
        threads=_engine_threads(engine, config.actors_min),
        memory_bytes=_engine_bytes(config.policy, engine, config.actors_min),
    )


def _of_quickstart(config: QuickstartConfig) -> Need:
    """Its stages run one after another, and read below `run_dir` what those before them have written there."""
    config = with_paths(config)
    made = Path(config.run_dir)
    stages = [need_of(getattr(config, name)) for name in ("generate", "warmup", "grpo", "evaluate", "serve")]

    def joined(name: str) -> dict:
        return dict.fromkeys(item for stage in stages for item in getattr(stage, name))

    found = {
        name: tuple(item for item in joined(name) if not Path(item.place).is_relative_to(made))
        for name in ("policies", "adapters", "depth_models", "datasets", "inputs")
    }
    largest = max(stages, key=lambda stage: stage.gpus.count)
    return Need(
        extras=frozenset().union(*(stage.extras for stage in stages)),
        engine=True,
        outputs=(Place("run_dir", config.run_dir),),
        gpus=largest.gpus,
        **{name: tuple(joined(name)) for name in ("endpoints", "key_variables", "trackers")},
        **{
            name: max(getattr(stage, name) for stage in stages)
            for name in ("cpus", "threads", "memory_bytes", "store_bytes")
        },
        **found,
    )


_NEEDS = {
    EvaluateConfig: _of_evaluate,
    GenerateConfig: _of_generate,
    GrpoConfig: _of_grpo,
    QuickstartConfig: _of_quickstart,
    ServeConfig: _of_serve,
    WarmupConfig: _of_warmup,
}


def _optional(key: str, place: str) -> tuple[Place, ...]:
    return (Place(key, place),) if place else ()


def _endpoints(blocks: list[tuple[str, EndpointConfig]]) -> dict[str, tuple]:
    return {
        "endpoints": tuple(Endpoint(key, at.model, at.base_url, at.api_key_env) for key, at in blocks),
        "key_variables": tuple((f"{key}.api_key_env", at.api_key_env) for key, at in blocks if at.api_key_env),
    }


# --- shares of one machine's memory, as lower bounds -----------------------------------------------------------------


def _learner_bytes(policy: str, learner: LearnerConfig, *, holds_reference: bool) -> int:
    """Weights, gradients and the optimiser's states on CPUs; on GPUs what is offloaded, beside the processes."""
    processes = learner.num_ranks * PROCESS_BYTES
    shape, _ = find_shape(policy)
    if shape is None:
        return processes
    rank = learner_memory(shape, learner, holds_reference=holds_reference)
    held = rank.host if learner.num_gpus_per_rank else sum(getattr(rank, name) for name in _HELD)
    return processes + learner.num_ranks * held


_HELD = ("weights", "gradients", "optimiser", "reference", "host")


def _engine_bytes(policy: str, engine: EngineConfig, number: int) -> int:
    """Float32 weights and the KV cache of engines on CPUs; on GPUs the processes alone."""
    shape, _ = find_shape(policy)
    weights = 4 * shape.num_parameters if shape else 0
    own = 0 if engine.num_gpus else weights + int(engine.kv_cache_gib * GIB)
    return number * (ENGINE_BYTES + own)


def _learner_threads(learner: LearnerConfig) -> int:
    return 0 if learner.num_gpus_per_rank else learner.num_ranks * learner.threads


def _engine_threads(engine: EngineConfig, number: int) -> int:
    return 0 if engine.num_gpus else number * engine.tensor_parallel_size * engine.threads
