"""Blocks that several stages have in their configuration."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sif_ray.config.check import Check

_SET_BY_THE_LEARNER = {
    "optimizer",
    "scheduler",
    "fp16",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
}


@dataclass
class RayConfig:
    address: str = ""  # "" = a submitted job's cluster (RAY_ADDRESS), else "local", one that this run starts for itself
    num_cpus: int = 0  # logical CPUs of a local cluster; 0 = as many as the machine has, at least 4
    object_store_mib: int = 512  # of a local cluster

    @property
    def cluster(self) -> str:
        """Address of the cluster; "local" = one that this run starts for itself."""
        around = os.environ.get("RAY_ADDRESS", "")
        return self.address or ("local" if around.startswith("http") else around) or "local"  # http: of the Jobs API

    @property
    def local(self) -> bool:
        """Whether the run starts a cluster for itself, whose size is known; one that is joined may grow."""
        return self.cluster == "local"

    @property
    def local_cpus(self) -> int:
        """Logical CPUs of a local cluster."""
        return self.num_cpus or max(4, os.cpu_count() or 1)

    CHECKS: ClassVar[list[Check]] = [
        ("num_cpus", lambda v: v >= 0, "must be 0 (all) or more"),
        ("object_store_mib", lambda v: v >= 80, "must be at least 80"),
    ]


@dataclass
class PromptConfig:
    depth_image: bool = True  # condition on the depth image too (the paper); False = RGB only (released RL code)
    with_depth_words: bool = True  # the suffix says "bounding box with depth" (dataset) or "bounding box" (released RL)


@dataclass
class SamplingConfig:
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    max_tokens: int = 2048

    CHECKS: ClassVar[list[Check]] = [
        ("temperature", lambda v: 0 <= v <= 2, "must lie in [0, 2], vLLM's own range; 0 is greedy"),
        ("top_p", lambda v: 0 < v <= 1, "must lie in (0, 1]"),
        ("top_k", lambda v: v >= 0, "must be 0 (off) or more"),
        ("max_tokens", lambda v: v >= 1, "must be at least 1"),
    ]


@dataclass
class EngineConfig:
    """One vLLM engine."""

    max_model_len: int = 4096
    max_num_seqs: int = 64
    tensor_parallel_size: int = 1  # workers of the engine, all on one machine; each has a share of every layer
    kv_cache_gib: float = 1.0  # CPU only; on GPU vLLM takes gpu_memory_utilization
    gpu_memory_utilization: float = 0.85
    enforce_eager: bool = True
    num_cpus: float = 1.0  # logical CPUs of the Ray actor
    num_gpus: float = 0.0  # of the Ray actor; tensor_parallel_size on GPUs, a fraction where a learner shares the GPU
    threads: int = 1  # OMP threads of each worker on a CPU

    CHECKS: ClassVar[list[Check]] = [
        ("max_model_len", lambda v: v >= 64, "must be at least 64 tokens"),
        ("max_num_seqs", lambda v: v >= 1, "must be at least 1"),
        ("tensor_parallel_size", lambda v: v >= 1, "must be at least 1"),
        ("kv_cache_gib", lambda v: v > 0, "must be positive"),
        ("gpu_memory_utilization", lambda v: 0 < v <= 1, "must lie in (0, 1]"),
        ("num_cpus", lambda v: v > 0, "must be positive; a fraction is fine"),
        ("num_gpus", lambda v: v >= 0, "must be 0 (CPUs) or more"),
        ("threads", lambda v: v >= 1, "must be at least 1"),
    ]

    def relations(self) -> Iterator[str]:
        """The workers of an engine are processes of its Ray actor and see the GPUs that Ray gives to that actor."""
        size, gpus = self.tensor_parallel_size, self.num_gpus
        if gpus > 0 and gpus != size and (size > 1 or gpus > 1):
            yield (
                f"num_gpus = {gpus:g} with tensor_parallel_size = {size}: an engine has a GPU for each of its workers; "
                "set both to the same number, num_gpus to a fraction for one worker on a shared GPU, or to 0 for CPUs"
            )


@dataclass
class LoraConfig:
    """Low-rank adapters beside frozen weights (arXiv 2106.09685). Engines and checkpoints get the merged weights, and
    the reference of the KL is the policy with its adapters off."""

    rank: int = 0  # 0 = no adapters, the weights themselves are trained; released: 8 in warm-up, 64 in RL
    alpha: float = 0.0  # an adapter adds alpha / rank * B A; 0 = 2 * rank (as released)
    dropout: float = 0.0  # of an adapter's input in training; released: 0.05 in RL
    targets: str = "language"  # linear layers with an adapter: "language" = all outside the vision tower, or "all"
    adapter: str = ""  # folder of an adapter to start from (peft, LLaMA-Factory), whose layers it then has

    CHECKS: ClassVar[list[Check]] = [
        ("rank", lambda v: v >= 0, "must be 0 (off) or more"),
        ("alpha", lambda v: v >= 0, "must be 0 (2 * rank) or more"),
        ("dropout", lambda v: 0 <= v < 1, "must lie in [0, 1)"),
        ("targets", lambda v: v in ("language", "all"), "must be language or all"),
    ]


@dataclass
class LearnerConfig:
    """DeepSpeed ranks and the optimiser."""

    num_ranks: int = 1  # a step trains on whole groups: ranks beyond groups_per_step have nothing to do
    num_gpus_per_rank: float = 0.0
    num_cpus_per_rank: float = 1.0
    threads: int = 1  # torch threads of a rank on a CPU
    zero_stage: int = 2
    learning_rate: float = 1e-5
    lr_schedule: str = "linear"  # decay to zero over the run: "linear", "cosine" or "constant"
    warmup_share: float = 0.0  # share of the steps in which the rate rises from zero
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    micro_batch_tokens: int = 8192  # tokens of one forward and backward pass
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third slower
    dtype: str = "float32"  # of weights and passes: "float32" or "bfloat16" (the optimiser keeps float32 copies)
    lora: LoraConfig = field(default_factory=LoraConfig)
    freeze_vision: bool = False  # do not train the vision tower and its merger (as released); they are synced anyway
    deepspeed: dict[str, Any] = field(default_factory=dict)  # merged into the DeepSpeed configuration, wins over it

    CHECKS: ClassVar[list[Check]] = [
        ("num_ranks", lambda v: v >= 1, "must be at least 1"),
        ("num_gpus_per_rank", lambda v: 0 <= v <= 1, "must lie in [0, 1]; a rank computes on one GPU"),
        ("num_cpus_per_rank", lambda v: v > 0, "must be positive; a fraction is fine"),
        ("zero_stage", lambda v: v in (0, 1, 2, 3), "must be 0, 1, 2 or 3"),
        ("learning_rate", lambda v: v > 0, "must be positive"),
        ("lr_schedule", lambda v: v in ("linear", "cosine", "constant"), "must be linear, cosine or constant"),
        ("warmup_share", lambda v: 0 <= v < 1, "must lie in [0, 1)"),
        ("max_grad_norm", lambda v: v > 0, "must be positive"),
        ("micro_batch_tokens", lambda v: v >= 1, "must be at least 1"),
        ("dtype", lambda v: v in ("float32", "bfloat16"), "must be float32 or bfloat16"),
        (
            "deepspeed",
            lambda v: not _SET_BY_THE_LEARNER & v.keys() and "stage" not in v.get("zero_optimization", {}),
            "must leave ZeRO stage, optimiser, schedule, batch sizes and fp16 to the other keys of the learner",
        ),
    ]

    def relations(self) -> Iterator[str]:
        if self.freeze_vision and self.lora.rank and self.lora.targets == "all":
            yield "freeze_vision = True, but lora.targets = 'all' trains the vision tower; set one of them otherwise"


@dataclass
class RewardConfig:
    """Weights of the reward terms (method.rewards); R = sum of weight * term."""

    format: float = 1.0
    answer: float = 1.0
    box: float = 1.0
    depth: float = 1.0
    search: float = 0.0  # ablation: the boxes never get worse from area to area, and better at least once
    binary: float = 0.0  # ablation: the answer is the reference character by character
    gate_depth_by_iou: bool = False  # multiply the depth term by min(1, 2 * IoU of the last boxes)


@dataclass
class PlacementConfig:
    """The machines of a GRPO run. What goes where is worked out from it (sif_ray.resources)."""

    nodes: int = 1  # those that learner and engines leave empty are for the reward workers, and need no GPUs
    gpus_per_node: int = 0  # 0 = everything runs on CPUs
    gpu_memory_gib: float = 80.0  # of one GPU; the estimate of a run must fit into it
    colocate: bool = False  # learner rank i and engine i share a GPU, each with the fraction it asks for
    timeout_s: float = 300.0  # for the cluster to have room for every actor at once

    CHECKS: ClassVar[list[Check]] = [
        ("nodes", lambda v: v >= 1, "must be at least 1"),
        ("gpus_per_node", lambda v: v >= 0, "must be 0 (CPUs only) or more"),
        ("gpu_memory_gib", lambda v: v > 0, "must be positive"),
        ("timeout_s", lambda v: v > 0, "must be positive"),
    ]


@dataclass
class ObjectiveConfig:
    """The loss of a GRPO step (sif_ray.learner.objective). The defaults are GRPO as released with SIFThinker, plus the
    truncated importance weight."""

    surrogate: str = "clip"  # "clip" (PPO, GRPO), "gspo" (ratio of whole sequences) or "cispo" (ratio as a weight)
    clip_low: float = 0.2  # ratios are clipped to [1 - clip_low, 1 + clip_high]; 1 = no lower bound
    clip_high: float = 0.2  # DAPO takes 0.28; sequence ratios need bounds of about 3e-4
    ratio_to: str = "proximal"  # policy before the batch's first update; "behaviour" = what the engine sampled from
    updates_per_batch: int = 1  # optimiser updates on the whole batch, one policy version in all (mu of GRPO)
    importance_cap: float = 2.0  # truncation of proximal / behaviour probability; 0 = no correction
    advantage_norm: str = "std"  # of a group: "std" divides by the deviation, "mean" only centres (Dr. GRPO)
    loss_mean: str = "sequence"  # of token means, "token" (DAPO) or "constant" (token sum / max_tokens, Dr. GRPO)
    kl_beta: float = 0.04  # weight of the k3 KL against the warm-up policy; 0 = no reference model is held

    CHECKS: ClassVar[list[Check]] = [
        ("surrogate", lambda v: v in ("clip", "gspo", "cispo"), "must be clip, gspo or cispo"),
        ("clip_low", lambda v: 0 < v <= 1, "must lie in (0, 1]; 1 sets no lower bound"),
        ("clip_high", lambda v: v > 0, "must be positive"),
        ("ratio_to", lambda v: v in ("proximal", "behaviour"), "must be proximal or behaviour"),
        ("updates_per_batch", lambda v: v >= 1, "must be at least 1"),
        ("importance_cap", lambda v: v == 0 or v >= 1, "must be 0 (off) or at least 1"),
        ("advantage_norm", lambda v: v in ("std", "mean"), "must be std or mean"),
        ("loss_mean", lambda v: v in ("sequence", "token", "constant"), "must be sequence, token or constant"),
        ("kl_beta", lambda v: v >= 0, "must be 0 (off) or more"),
    ]


@dataclass
class EndpointConfig:
    """A chat model behind an OpenAI-compatible API, and how it is called (sif_ray.judge)."""

    model: str = ""  # its name at the endpoint
    base_url: str = ""  # e.g. "https://api.openai.com/v1" or "http://judge-host:8000/v1"
    api_key_env: str = ""  # NAME of the environment variable that holds the key, on every node; "" = no key
    max_tokens: int = 256  # of a reply; a model that reasons first needs thousands
    max_concurrency: int = 32  # calls in flight, over all workers
    requests_per_minute: int = 0  # over all workers; 0 = no limit
    timeout_s: float = 60.0  # of one attempt
    max_retries: int = 5  # attempts after the first, with growing pauses
    breaker_failures: int = 6  # failed attempts in a row, max_retries + 1 at most, after which a worker holds back
    breaker_cooldown_s: float = 20.0  # until it tries one call again
    max_wait_s: float = 120.0  # a model that answers nobody for longer is given up, and the run stops; 0 = at once
    usd_per_million_tokens: list[float] = field(default_factory=lambda: [0.0, 0.0])  # prompt, reply; for the metric usd

    CHECKS: ClassVar[list[Check]] = [
        (
            "base_url",
            lambda v: v == "" or v.startswith(("http://", "https://")),
            "must be the address of an OpenAI-compatible API, e.g. http://localhost:8000/v1",
        ),
        ("max_tokens", lambda v: v >= 16, "must be at least 16"),
        ("max_concurrency", lambda v: v >= 1, "must be at least 1"),
        ("requests_per_minute", lambda v: v >= 0, "must be 0 (no limit) or more"),
        ("timeout_s", lambda v: v > 0, "must be positive"),
        ("max_retries", lambda v: v >= 0, "must be 0 or more"),
        ("breaker_failures", lambda v: v >= 1, "must be at least 1"),
        ("breaker_cooldown_s", lambda v: v > 0, "must be positive"),
        ("max_wait_s", lambda v: v >= 0, "must be 0 or more"),
        (
            "usd_per_million_tokens",
            lambda v: len(v) == 2 and min(v) >= 0,
            "must be two prices, of prompt and of reply tokens",
        ),
    ]

    @property
    def is_called(self) -> bool:
        """Whether the run asks the endpoint."""
        return True

    def shared_by(self, workers: str, count: int, block: str = "") -> Iterator[str]:
        """What is wrong with `count` workers, the setting `workers`, for this endpoint, which is at `block`."""
        if count > self.max_concurrency:
            yield (
                f"{workers} ({count}) is above {block}max_concurrency ({self.max_concurrency}), which they share; "
                "lower the one or raise the other"
            )

    def relations(self) -> Iterator[str]:
        for name in ("model", "base_url") if self.is_called else ():
            if not getattr(self, name):
                yield f"{name} = '': an endpoint needs the model's name and the address of its OpenAI-compatible API"
        if self.api_key_env and not self.api_key_env.isidentifier():  # not shown: it may be the key itself
            yield "api_key_env must be the name of an environment variable, e.g. JUDGE_API_KEY"


@dataclass
class JudgeConfig(EndpointConfig):
    """Who scores the answers (sif_ray.judge). The keys of the endpoint matter to the kind "llm" only."""

    kind: str = "exact"  # "exact": numbers, options, synonyms compared as text; "llm": an OpenAI-compatible endpoint
    with_image: bool = True  # show the photo to the judge (the paper)

    CHECKS: ClassVar[list[Check]] = [
        ("kind", lambda v: v in ("exact", "llm"), "must be exact or llm"),
    ]

    @property
    def is_called(self) -> bool:
        return self.kind == "llm"


@dataclass
class TeacherConfig(EndpointConfig):
    """Who writes the traces of a dataset ("forward inference")."""

    kind: str = "template"  # "template": fixed sentences; "llm": an endpoint; "vllm": `model` in engines of this run
    max_tokens: int = 2048
    timeout_s: float = 180.0
    max_wait_s: float = 3600.0  # a teacher that is down longer stops the run, which can be started again
    temperature: float = 1.0
    repairs: int = 1  # attempts after a reply that fails the checks, each told what was wrong
    actors_min: int = 1  # processes that call the teacher; of the kind "vllm" each has an engine of its own
    actors_max: int = 1
    engine: EngineConfig = field(default_factory=EngineConfig)  # kind "vllm"

    CHECKS: ClassVar[list[Check]] = [
        ("kind", lambda v: v in ("template", "llm", "vllm"), "must be template, llm or vllm"),
        ("temperature", lambda v: 0 <= v <= 2, "must lie in [0, 2]"),
        ("repairs", lambda v: v >= 0, "must be 0 or more"),
        ("actors_min", lambda v: v >= 1, "must be at least 1"),
    ]

    @property
    def is_called(self) -> bool:
        return self.kind == "llm"

    def relations(self) -> Iterator[str]:
        yield from super().relations()
        if self.kind == "vllm" and not self.model:
            yield "model = '': kind = 'vllm' needs a folder or a hub id"
        if self.actors_max < self.actors_min:
            yield f"actors_max ({self.actors_max}) is below actors_min ({self.actors_min}); raise it or lower the other"
        if self.kind != "template":
            yield from self.shared_by("actors_max", self.actors_max)
        if self.kind == "vllm" and self.max_tokens >= self.engine.max_model_len:
            yield (
                f"max_tokens ({self.max_tokens}) leaves no room for a prompt, which has up to five photographs, in "
                f"engine.max_model_len ({self.engine.max_model_len}); lower the one or raise the other"
            )
