"""The plan of a GRPO run: where its actors go and what they need, checked before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from sif_ray.config import ConfigError, GrpoConfig, LearnerConfig
from sif_ray.resources.memory import (
    GIB,
    PROCESS_BYTES,
    EngineMemory,
    LearnerMemory,
    adapter_parameters,
    engine_memory,
    learner_memory,
    trained_parameters,
)
from sif_ray.resources.object_store import check_object_store
from sif_ray.resources.placement import Layout, Seat, lay_out
from sif_ray.resources.shapes import PolicyShape, find_shape

PROMPT_TEXT_TOKENS = 192  # of a prompt beside its images: template, question, instructions


@dataclass(frozen=True)
class Plan:
    """What a run will take of its machines. Estimates are None for a policy of unknown shape."""

    layout: Layout
    shape: PolicyShape | None
    shape_source: str
    learner: LearnerMemory | None
    engine: EngineMemory | None


def make_plan(config: GrpoConfig) -> Plan:
    """Raises `ConfigError` for a layout or a policy that the machines cannot hold, naming the way out.

    Memory is judged on GPUs only; what a policy on CPUs needs is shown and not judged.
    """
    layout = lay_out(config)
    shape, source = find_shape(config.policy)
    if shape is None:
        return Plan(layout, None, source, None, None)
    on_gpu = config.placement.gpus_per_node > 0
    learner = learner_memory(shape, config.learner, holds_reference=config.objective.kl_beta > 0)
    engine = engine_memory(shape, config.engine, config.placement.gpu_memory_gib * GIB) if on_gpu else None
    plan = Plan(layout, shape, source, learner, engine)
    for complaint in (*shape_complaints(config, shape), *_memory_complaints(config, plan)):
        raise ConfigError(complaint)
    check_object_store(config, shape.num_parameters, samples=())
    return plan


def shape_complaints(config: GrpoConfig, shape: PolicyShape) -> Iterator[str]:
    """Why engines of this configuration cannot hold a policy of this shape, each with the way out."""
    ranks = config.engine.tensor_parallel_size
    divided = {
        "attention heads": shape.heads,
        "MLP columns": shape.mlp,
        "vision heads": shape.vision_heads,
        "vision MLP columns": shape.vision_mlp,
    }
    for what, count in divided.items():
        if count % ranks:
            yield (
                f"engine.tensor_parallel_size = {ranks} does not divide the policy's {count} {what}; {_divisors(shape)}"
            )
    if shape.kv_heads % ranks and ranks % shape.kv_heads:
        yield (
            f"engine.tensor_parallel_size = {ranks} neither divides the policy's {shape.kv_heads} KV heads nor is a "
            f"multiple of them; {_divisors(shape)}"
        )
    images = (2 if config.prompt.depth_image else 1) * (config.max_pixels // shape.px_per_token)
    needed = images + PROMPT_TEXT_TOKENS + config.sampling.max_tokens
    if config.max_pixels and needed > config.engine.max_model_len:
        yield (
            f"engine.max_model_len ({config.engine.max_model_len}) is below {images} image tokens (max_pixels = "
            f"{config.max_pixels}) + about {PROMPT_TEXT_TOKENS} of text + sampling.max_tokens "
            f"({config.sampling.max_tokens}); raise it to {needed} or lower max_pixels or sampling.max_tokens"
        )


def _divisors(shape: PolicyShape) -> str:
    def fits(ranks: int) -> bool:
        whole = all(count % ranks == 0 for count in (shape.heads, shape.mlp, shape.vision_heads, shape.vision_mlp))
        return whole and (shape.kv_heads % ranks == 0 or ranks % shape.kv_heads == 0)

    return f"use one of {', '.join(str(ranks) for ranks in range(1, 17) if fits(ranks))}"


def _memory_complaints(config: GrpoConfig, plan: Plan) -> Iterator[str]:
    learner, engine, gpu = plan.learner, plan.engine, config.placement.gpu_memory_gib
    if learner is None or engine is None:
        return
    if learner.total > gpu * GIB:
        yield (
            f"a learner rank needs about {_gib(learner.total)} GiB ({_parts(learner)}) of placement.gpu_memory_gib = "
            f"{gpu:g}; {_learner_way_out(config)}"
        )
    share = config.engine.gpu_memory_utilization
    if not engine.sequences:
        yield (
            f"an engine's {share:g} of {gpu:g} GiB holds no sequence of engine.max_model_len = "
            f"{config.engine.max_model_len} beside {_gib(engine.weights)} GiB of weights and {_gib(engine.working)} "
            "GiB of work; raise engine.gpu_memory_utilization or engine.tensor_parallel_size, or lower "
            "engine.max_model_len or engine.max_num_seqs"
        )
    if config.placement.colocate and learner.total + share * gpu * GIB > gpu * GIB:
        yield (
            f"a colocated learner rank needs about {_gib(learner.total)} GiB ({_parts(learner)}) beside the engine's "
            f"{share:g} of {gpu:g} GiB; lower engine.gpu_memory_utilization, or {_learner_way_out(config)}"
        )


def _learner_way_out(config: GrpoConfig) -> str:
    learner = config.learner
    ways = [
        ("set learner.zero_stage to 3", learner.zero_stage < 3),
        ("set learner.gradient_checkpointing", not learner.gradient_checkpointing),
        ("lower learner.micro_batch_tokens", learner.micro_batch_tokens > config.engine.max_model_len),
        ("set learner.lora.rank", not learner.lora.rank),
        ("raise learner.num_ranks", True),
        ("offload (learner.deepspeed.zero_optimization.offload_optimizer.device=cpu)", True),
    ]
    return " or ".join(way for way, open_ in ways if open_)


# --- the plan in words -----------------------------------------------------------------------------------------------


def describe(config: GrpoConfig, plan: Plan) -> str:
    """What a dry run prints below the settings."""
    return "\n".join([*_placement_lines(config, plan.layout), *_memory_lines(config, plan), *_input_lines(config)])


def _placement_lines(config: GrpoConfig, layout: Layout) -> Iterator[str]:
    placement = config.placement
    machines = f"{placement.nodes} x {placement.gpus_per_node} GPUs" if placement.gpus_per_node else "CPUs only"
    yield f"Placement ({machines}, {'colocated' if placement.colocate else 'learner and engines apart'})"
    for number, bundles in enumerate(layout.nodes):
        cpus, gpus = (sum(getattr(bundle, what) for bundle in bundles) for what in ("num_cpus", "num_gpus"))
        name = f"node {number}" if placement.gpus_per_node else "cluster"
        yield f"  {name}: {cpus:g} logical CPUs" + (f", {gpus:g} of {placement.gpus_per_node} GPUs" if gpus else "")
        first = 0
        for bundle in bundles:
            last = first + int(bundle.num_gpus) - 1
            where = f"GPU {first}" + (f"-{last}" if last > first else "") if bundle.num_gpus else "CPU"
            yield f"    {where:<8} {' + '.join(map(_seat, bundle.seats))}"
            first = last + 1 if bundle.num_gpus else first


def _seat(seat: Seat) -> str:
    return f"{seat.actor} ({seat.num_cpus:g} CPU" + (f", {seat.num_gpus:g} GPU)" if seat.num_gpus else ")")


def _memory_lines(config: GrpoConfig, plan: Plan) -> Iterator[str]:
    if plan.shape is None or plan.learner is None:
        yield f"Memory: no estimate ({plan.shape_source})"
        return
    yield from learner_lines(plan.shape, plan.shape_source, config.learner, plan.learner)
    if plan.engine is None:
        yield f"  engine: KV cache of {config.engine.kv_cache_gib:g} GiB beside the weights"
        return
    gpu, engine = config.placement.gpu_memory_gib, plan.engine
    yield (
        f"  engine, per GPU: {_gib(engine.total)} GiB ({_gib(engine.weights)} weights, {_gib(engine.working)} work, "
        f"{_gib(engine.kv_cache)} KV cache = {engine.sequences} sequences of {config.engine.max_model_len} tokens)"
    )
    together = plan.learner.total + engine.total
    fullest = together if config.placement.colocate else max(plan.learner.total, engine.total)
    yield f"  fullest GPU: {_gib(fullest)} of {gpu:g} GiB"


def learner_lines(shape: PolicyShape, source: str, config: LearnerConfig, memory: LearnerMemory) -> Iterator[str]:
    """The estimate for a learner rank in words."""
    adapters = adapter_parameters(shape, config)
    parameters = f"{_count(shape.num_parameters)} parameters"
    if adapters:
        parameters += f" + {_count(adapters)} of LoRA"
    yield f"Memory, estimated ({parameters}, {_count(trained_parameters(shape, config))} trained; shape: {source})"
    yield f"  learner rank: {_gib(memory.total)} GiB at its peak ({_parts(memory)})"
    if memory.host:
        yield f"    on the machine: {_gib(memory.host)} GiB offloaded per rank"


def _parts(learner: LearnerMemory) -> str:
    shown = [
        f"{_gib(getattr(learner, part.name))} {part.name}"
        for part in fields(learner)
        if part.name not in ("update", "host") and getattr(learner, part.name)
    ]
    return ", ".join([*shown, f"{_gib(PROCESS_BYTES)} process"])


def _input_lines(config: GrpoConfig) -> Iterator[str]:
    for key in ("data", "policy"):
        value = getattr(config, key)
        if value != "toy" and not Path(value).exists():
            yield f"{key}: {value} is not found here; it is needed when the stage starts"


def _gib(count: float) -> str:
    return f"{count / GIB:.1f}" if count >= GIB / 10 else f"{count / GIB:.2g}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
