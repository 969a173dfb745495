"""Memory of one GPU, estimated from the policy's shape. Pure; bytes everywhere.

What weights, gradients and optimiser take follows from the counts of arXiv 1910.02054 section 3 (ZeRO) and is exact.
Activations are counted tensor by tensor as in arXiv 2205.05198 section 4, for the blocks of Qwen2.5-VL with fused
attention. What libraries hold for themselves (context, allocator) is a round number.

Symbols: P parameters, Q trained ones, N ranks, D bytes of a weight (2 or 4), T tokens of a micro-batch, h width,
f width of the MLP, a heads, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sif_ray.config import EngineConfig, LearnerConfig
from sif_ray.resources.shapes import PolicyShape

GIB = 2**30
PROCESS_BYTES = 1 * GIB  # CUDA context, communication buffers and kernels' workspace of one process
HEAD_CHUNKS = 8  # logits are computed in parts (sif_ray.policy.branches)
ENGINE_BATCH_TOKENS = 8192  # of one step of a vLLM engine, by its default on large GPUs

# DeepSpeed's own defaults, in elements (its documentation, "ZeRO Optimizations for FP16 Training").
REDUCE_BUCKET = 500_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000
SUB_GROUP = 1_000_000_000


@dataclass(frozen=True)
class LearnerMemory:
    """Bytes of one learner rank."""

    weights: int
    gradients: int
    optimiser: int  # float32 copies and the two moments of Adam
    reference: int  # frozen policy of the KL
    buffers: int  # DeepSpeed's: gradients on their way to other ranks, weights gathered for a pass
    activations: int  # kept for the backward pass, at the largest micro-batch
    logits: int  # of the predicted tokens
    update: int  # temporaries of the optimiser, when there are no activations
    host: int  # offloaded, in the memory of the machine

    @property
    def total(self) -> int:
        """The peak on the GPU: passes and update take turns."""
        held = self.weights + self.gradients + self.optimiser + self.reference + PROCESS_BYTES
        return held + max(self.buffers + self.activations + self.logits, self.update)


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of one GPU of a vLLM engine."""

    weights: int
    working: int  # activations of one step, logits, context
    kv_cache: int  # what is left of the engine's share; negative = the engine cannot start
    sequences: int  # of max_model_len tokens that the cache holds at once

    @property
    def total(self) -> int:
        return self.weights + self.working + max(0, self.kv_cache)


def learner_memory(shape: PolicyShape, config: LearnerConfig, *, holds_reference: bool) -> LearnerMemory:
    """One rank of a learner. `holds_reference`: the KL needs a frozen copy (with LoRA it never does)."""
    size = bytes_per_weight(config)
    total = shape.num_parameters + adapter_parameters(shape, config)
    trained = trained_parameters(shape, config)
    zero = config.deepspeed.get("zero_optimization", {})
    weights = weight_bytes(total, config)
    reference = weight_bytes(shape.num_parameters, config) if holds_reference and not config.lora.rank else 0
    gradients = gradient_bytes(trained, config)
    optimiser = optimiser_bytes(trained, config)
    buffers = 0
    if config.zero_stage:
        buffers += size * _elements(zero, "reduce_bucket_size", REDUCE_BUCKET)
    if config.zero_stage == 3:
        buffers += size * min(total, _elements(zero, "stage3_max_live_parameters", MAX_LIVE_PARAMETERS))
    share = -(-trained // (config.num_ranks if config.zero_stage else 1))
    if config.zero_stage == 3:
        share = min(share, _elements(zero, "sub_group_size", SUB_GROUP))
    update = 8 * share if config.zero_stage else 4 * share  # a float32 copy of the gradient, the root of a moment
    host = 0
    if _offloads(zero, "offload_optimizer"):
        host, optimiser, update = host + optimiser, 0, 0
    if _offloads(zero, "offload_param"):
        host, weights = host + weights, 0
    return LearnerMemory(
        weights=weights,
        gradients=gradients,
        optimiser=optimiser,
        reference=reference,
        buffers=buffers,
        activations=activation_bytes(shape, config),
        logits=logit_bytes(shape, config),
        update=update,
        host=host,
    )


# --- states of the training: exact -----------------------------------------------------------------------------------


def bytes_per_weight(config: LearnerConfig) -> int:
    return 2 if config.dtype == "bfloat16" else 4


def adapter_parameters(shape: PolicyShape, config: LearnerConfig) -> int:
    """r * (inputs + outputs) for every layer with an adapter (arXiv 2106.09685)."""
    layers = shape.layers * shape.language_linears
    if not shape.tied:
        layers += [(shape.hidden, shape.vocabulary)]
    if config.lora.targets == "all":
        layers += shape.vision_layers * shape.vision_linears + shape.merger_linears
    return config.lora.rank * sum(inputs + outputs for inputs, outputs in layers)


def trained_parameters(shape: PolicyShape, config: LearnerConfig) -> int:
    """Q: adapters alone with LoRA, all but the vision tower with `freeze_vision`, else all."""
    if config.lora.rank:
        return adapter_parameters(shape, config)
    return shape.language_parameters if config.freeze_vision else shape.num_parameters


def weight_bytes(parameters: int, config: LearnerConfig) -> int:
    """D * P, divided among the ranks by ZeRO-3."""
    return bytes_per_weight(config) * _share(parameters, config, from_stage=3)


def gradient_bytes(trained: int, config: LearnerConfig) -> int:
    """D * Q, or 4 * Q where they are summed in float32; divided among the ranks by ZeRO-2 and 3."""
    in_float32 = config.deepspeed.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    return (4 if in_float32 else bytes_per_weight(config)) * _share(trained, config, from_stage=2)


def optimiser_bytes(trained: int, config: LearnerConfig) -> int:
    """12 * Q: float32 weights and Adam's moments, divided among the ranks by every ZeRO stage.

    Without ZeRO float32 weights are their own copy: 8 * Q.
    """
    has_copy = config.zero_stage > 0 or config.dtype == "bfloat16"
    return (12 if has_copy else 8) * _share(trained, config, from_stage=1)


def _share(parameters: int, config: LearnerConfig, *, from_stage: int) -> int:
    return -(-parameters // config.num_ranks) if config.zero_stage >= from_stage else parameters


def _elements(zero: dict[str, Any], key: str, default: int) -> int:
    value = zero.get(key, default)
    return default if value == "auto" else int(value)


def _offloads(zero: dict[str, Any], key: str) -> bool:
    return zero.get(key, {}).get("device", "none") != "none"


# --- what passes keep ------------------------------------------------------------------------------------------------


def block_bytes(width: int, mlp: int, heads: int, size: int) -> int:
    """What one gated transformer block keeps per token for its backward pass, without its attention mask.

    Two RMS norms: a float32 copy of the input, the normalised state and the output; query, key, value and output of the
    attention; gate, activated gate, up and their product in the MLP; the attention's log-sum-exp per head; two roots.
    2 (4 + 2 D) h + 4 D h + 4 D f + 4 a + 8. Keys and values count at full width: they are repeated for their heads.
    """
    return 2 * (4 + 2 * size) * width + 4 * size * width + 4 * size * mlp + 4 * heads + 8


def activation_bytes(shape: PolicyShape, config: LearnerConfig) -> int:
    """All blocks of the language model and, where it is trained, of the vision tower, at T = micro_batch_tokens.

    With gradient checkpointing: the input of every block, and one block. The mask is counted as if one sequence had all
    T tokens (D * T per token and block), the vision tower as if every token were an image's. Its blocks keep three
    widths more than `block_bytes`: query, key and value share one tensor, and the attention's output is copied.
    """
    size, tokens = bytes_per_weight(config), config.micro_batch_tokens
    block = tokens * (block_bytes(shape.hidden, shape.mlp, shape.heads, size) + size * tokens)
    if config.lora.rank and config.lora.dropout:  # the inputs of adapters, dropped out, and one byte of mask
        block += tokens * (size + 1) * sum(inputs for inputs, _ in shape.language_linears)
    kept = _kept(block, shape.layers, tokens * size * shape.hidden, config)
    if trains_vision(config):
        patches = tokens * shape.merge**2
        width = shape.vision_hidden
        vision = patches * (block_bytes(width, shape.vision_mlp, shape.vision_heads, size) + 3 * size * width)
        kept += _kept(vision, shape.vision_layers, patches * size * width, config)
    return kept


def trains_vision(config: LearnerConfig) -> bool:
    """Whether a backward pass goes through the vision tower."""
    return config.lora.targets == "all" if config.lora.rank else not config.freeze_vision


def _kept(block: int, blocks: int, inputs: int, config: LearnerConfig) -> int:
    return blocks * inputs + block if config.gradient_checkpointing else blocks * block


def logit_bytes(shape: PolicyShape, config: LearnerConfig) -> int:
    """12 V per predicted token of one of `HEAD_CHUNKS` parts: log-probs, their exponentials and the products of both,
    in float32. As if all T tokens were predicted.
    """
    return 12 * shape.vocabulary * -(-config.micro_batch_tokens // HEAD_CHUNKS)


# --- engine ----------------------------------------------------------------------------------------------------------


def kv_token_bytes(shape: PolicyShape, ranks: int) -> int:
    """Bytes of a token of the KV cache on one of `ranks` GPUs: keys and values, 2 bytes each, of its heads."""
    return 2 * shape.layers * max(1, shape.kv_heads // ranks) * shape.head_dim * 2


def engine_memory(shape: PolicyShape, config: EngineConfig, gpu_bytes: float) -> EngineMemory:
    """One GPU of an engine in bfloat16. vLLM takes gpu_memory_utilization of the GPU, and what weights and one step
    leave of that becomes KV cache.
    """
    ranks = config.tensor_parallel_size
    weights = 2 * -(-shape.num_parameters // ranks)
    kv_token = kv_token_bytes(shape, ranks)
    language = ENGINE_BATCH_TOKENS * 2 * (3 * shape.mlp // ranks + 4 * shape.hidden)
    vision = ENGINE_BATCH_TOKENS * shape.merge**2 * 2 * (3 * shape.vision_mlp // ranks + 5 * shape.vision_hidden)
    logits = 3 * 4 * config.max_num_seqs * shape.vocabulary
    working = max(language, vision) + logits + PROCESS_BYTES
    kv_cache = int(config.gpu_memory_utilization * gpu_bytes) - weights - working
    return EngineMemory(weights, working, kv_cache, max(0, kv_cache) // (kv_token * config.max_model_len))
