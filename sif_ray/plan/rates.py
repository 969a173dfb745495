"""How long the parts of a run take on a type of GPU, from sizes and data sheets. Nothing here was measured.

A decode step reads the weights and the KV cache of every sequence once and multiplies with every weight, whichever
takes longer. A pass of the learner is 2 operations per weight and token forward, 4 backward (2 through frozen weights),
and 2 more where activations are computed again. Libraries reach a part of the peaks: `Assumptions`.
"""

from __future__ import annotations

from dataclasses import dataclass

from sif_ray.config import ConfigError, GrpoConfig
from sif_ray.plan.gpus import Gpu
from sif_ray.plan.scenario import LearnerRates, Lengths, Rates
from sif_ray.resources.memory import GIB, engine_memory, kv_token_bytes, trained_parameters, trains_vision
from sif_ray.resources.plan import PROMPT_TEXT_TOKENS
from sif_ray.resources.shapes import PolicyShape


@dataclass(frozen=True)
class Assumptions:
    """What a plan takes for granted; `--assume name=value` changes one. Shares are of the data sheet's figure."""

    train_mfu: float = 0.35  # of peak operations in the learner's passes (0.38 to 0.43 in arXiv 2407.21783, Table 4)
    prefill_mfu: float = 0.40  # of peak operations while prompts are read
    decode_bandwidth: float = 0.60  # of the memory's bandwidth in decode steps
    decode_mfu: float = 0.50  # of peak operations in decode steps
    eager_layer_us: float = 300.0  # time per layer and step to launch kernels, with engine.enforce_eager
    graph_layer_us: float = 30.0  # the same with captured graphs
    network_share: float = 0.70  # of links and networks
    host_gbs: float = 5.0  # 10^9 bytes per second copied in a machine's memory: object store, staging files
    storage_gbs: float = 2.0  # 10^9 bytes per second that one machine writes to storage
    optimiser_s: float = 0.3  # of a training step, beside its passes
    read_s: float = 0.02  # of a reward worker for one group, beside the judge
    engine_start_s: float = 180.0  # from a loss to an engine with weights of version 0
    learner_start_s: float = 300.0  # from a loss to a learner that has loaded its checkpoint


@dataclass(frozen=True)
class Workload:
    """What goes through a run, beside what its configuration says."""

    prompt_tokens: int
    image_tokens: int  # of the prompt
    lengths: Lengths


def workload_of(
    config: GrpoConfig, shape: PolicyShape, *, prompt_tokens: int, response_tokens: float, response_cv: float
) -> Workload:
    """`prompt_tokens` 0 = images of `config.max_pixels` and about `PROMPT_TEXT_TOKENS` of text."""
    images = (2 if config.prompt.depth_image else 1) * (config.max_pixels // shape.px_per_token)
    if not prompt_tokens and not images:
        raise ConfigError("max_pixels = 0: the size of the images is not known; give --prompt-tokens, or max_pixels")
    prompt = prompt_tokens or images + PROMPT_TEXT_TOKENS
    if prompt + config.sampling.max_tokens > config.engine.max_model_len and prompt_tokens:
        raise ConfigError(
            f"--prompt-tokens {prompt_tokens}: with sampling.max_tokens = {config.sampling.max_tokens} it exceeds "
            f"engine.max_model_len = {config.engine.max_model_len}; lower the one or raise the other"
        )
    lengths = Lengths(response_tokens, config.sampling.max_tokens, response_cv)
    return Workload(prompt, min(images or prompt, prompt), lengths)


def max_sequences(config: GrpoConfig, shape: PolicyShape, gpu: Gpu, workload: Workload) -> int:
    """Sequences that an engine writes at once: as many as it may, if its KV cache holds so many of mean length.

    The prompt of a group is held once. Raises `ConfigError` where it holds none.
    """
    memory = engine_memory(shape, config.engine, gpu.memory_gib * GIB)
    tokens = memory.kv_cache // kv_token_bytes(shape, config.engine.tensor_parallel_size)
    held = int(tokens // (workload.lengths.mean + workload.prompt_tokens / config.group_size))
    if memory.sequences < 1 or held < 1:
        raise ConfigError(
            f"engine.tensor_parallel_size = {config.engine.tensor_parallel_size}: the weights leave no room for a "
            f"sequence of engine.max_model_len in {gpu.memory_gib:g} GiB; raise it, or take a larger --gpu"
        )
    return min(config.engine.max_num_seqs, held)


def estimate(
    config: GrpoConfig,
    shape: PolicyShape,
    gpu: Gpu,
    workload: Workload,
    assumed: Assumptions,
    *,
    num_engines: int,
    learner_ranks: int,
    judge_latency_s: float,
    judge_latency_cv: float = 0.5,
) -> Rates:
    """The rates of a run with so many engines and ranks, on machines of `placement.gpus_per_node` GPUs (0 = 8)."""
    per_node = config.placement.gpus_per_node or 8
    peak, size = gpu.tflops * 1e12, 2 * shape.num_parameters
    network = gpu.network_gbs * 1e9 * assumed.network_share
    engine_nodes = -(-num_engines * config.engine.tensor_parallel_size // per_node)
    by_store = config.weight_transfer == "object_store"
    rounds = engine_nodes.bit_length()  # whoever has the weights passes them on
    copy_s = size / (assumed.host_gbs * 1e9)
    saved = 12 * trained_parameters(shape, config.learner) + size
    return Rates(
        decode_step_s=decode_steps(config, shape, gpu, workload, assumed),
        learner=learner_rates(config, shape, gpu, workload, assumed, learner_ranks, network),
        prefill_s=(
            2 * matrix_parameters(shape) * workload.prompt_tokens
            + 2 * shape.vision_parameters * workload.image_tokens * shape.merge**2
        )
        / (config.engine.tensor_parallel_size * peak * assumed.prefill_mfu),
        score_s=assumed.read_s,
        judge_latency_s=judge_latency_s,
        judge_latency_cv=judge_latency_cv,
        publish_s=copy_s if by_store else 0.0,
        transfer_s=rounds * size / network + copy_s if by_store else size / network,
        transfer_in_turn=not by_store,  # rank 0 sends to one engine after the other (sif_ray.rollout.wire)
        pause_s=copy_s if by_store else size / (gpu.memory_gbs * 1e9 * assumed.decode_bandwidth),
        checkpoint_s=saved / (-(-learner_ranks // per_node) * assumed.storage_gbs * 1e9),
        engine_start_s=assumed.engine_start_s,
        learner_start_s=assumed.learner_start_s,
    )


def matrix_parameters(shape: PolicyShape) -> int:
    """Weights of the language model that every token is multiplied with: all but the input embedding."""
    return shape.language_parameters - (0 if shape.tied else shape.vocabulary * shape.hidden)


def decode_steps(
    config: GrpoConfig, shape: PolicyShape, gpu: Gpu, workload: Workload, assumed: Assumptions
) -> tuple[float, ...]:
    """[n]: seconds of a step in which n sequences get a token, each with the prompt and half its answer behind it."""
    ranks = config.engine.tensor_parallel_size
    weights = 2 * matrix_parameters(shape) / ranks
    cache = kv_token_bytes(shape, ranks) * (workload.prompt_tokens + workload.lengths.mean / 2)
    launch_s = shape.layers * (assumed.eager_layer_us if config.engine.enforce_eager else assumed.graph_layer_us) / 1e6
    bandwidth, peak = gpu.memory_gbs * 1e9 * assumed.decode_bandwidth, gpu.tflops * 1e12 * assumed.decode_mfu
    return tuple(
        max((weights + n * cache) / bandwidth, n * weights / peak, launch_s)
        for n in range(config.engine.max_num_seqs + 1)
    )


def learner_rates(
    config: GrpoConfig,
    shape: PolicyShape,
    gpu: Gpu,
    workload: Workload,
    assumed: Assumptions,
    ranks: int,
    network: float,
) -> LearnerRates:
    """Seconds per token and per group's images of one rank, and what ZeRO-3 gathers for a micro-batch.

    The weights are gathered once forward and once backward and the trained ones' gradients reduced, `network` bytes per
    second between machines and the links' within one; the pass hides what takes no longer than itself.
    """
    learner, updates = config.learner, config.objective.updates_per_batch
    peak = gpu.tflops * 1e12 * assumed.train_mfu
    again = 2 if learner.gradient_checkpointing else 0
    language = updates * (2 + again + (2 if learner.lora.rank else 4)) + (2 if config.objective.kl_beta > 0 else 0)
    vision = updates * (2 + (again + 4 if trains_vision(learner) else 0)) + (2 if config.objective.kl_beta > 0 else 0)
    speed = network if ranks > (config.placement.gpus_per_node or 8) else gpu.link_gbs * 1e9 * assumed.network_share
    gathered = (4 * shape.num_parameters if learner.zero_stage == 3 else 0) + 2 * trained_parameters(shape, learner)
    return LearnerRates(
        step_s=assumed.optimiser_s,
        token_s=language * matrix_parameters(shape) / peak,
        group_s=vision * shape.vision_parameters * workload.image_tokens * shape.merge**2 / peak,
        gather_s=updates * gathered / speed if ranks > 1 else 0.0,
        micro_batch_tokens=learner.micro_batch_tokens,
    )
