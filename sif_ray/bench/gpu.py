"""The suite `gpu`: one GPU with a policy of Qwen2.5-VL-3B's structure and random weights, learner and engine on it.

What `cost` measures at one point, with the sizes of a run on GPUs: LoRA of rank 64 in bfloat16, as in
configs/published/3b-colocated.yaml. The learner's model FLOPs are 4 per weight of the language model and token of its
sequences (forward, and backward to the activations; weights under LoRA have no gradients), recomputed activations not
counted, and are compared with the rate of a matrix product in bfloat16 on the same card. Without a GPU nothing is
measured. This suite has not been run on a GPU yet.
"""

from __future__ import annotations

import logging
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from sif_ray.bench.cost import Point, measure_point
from sif_ray.bench.findings import Findings, Goal, spread
from sif_ray.bench.watch import Watch
from sif_ray.config import (
    EngineConfig,
    GrpoConfig,
    LearnerConfig,
    LoraConfig,
    ObjectiveConfig,
    PlacementConfig,
    SamplingConfig,
)
from sif_ray.policy.random_policy import write_random_policy
from sif_ray.resources.shapes import KNOWN

log = logging.getLogger(__name__)

MODEL_FLOP_UTILISATION = 0.4
SHAPE = KNOWN["qwen2.5-vl-3b"]
FLOPS_PER_WEIGHT = 4
SIDE, PRODUCTS = 8192, 20  # of the matrices, and how many are multiplied


def measure(repetitions: int) -> Findings:
    """Rates of learner and engine, seconds of a weight update, peak memory; only a reason where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        log.warning("bench gpu: skipped, no CUDA GPU is visible to this process")
        return Findings([], {"skipped": "no CUDA GPU is visible to this process"})
    with tempfile.TemporaryDirectory(prefix="sif_ray-bench-") as name:
        policy = str(Path(name) / "policy")
        write_random_policy(SHAPE, policy, dtype="bfloat16")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:  # leaves nothing on the card
            matrix_flop_per_s = process.submit(_matrix_rate).result()
        with _GpuMemoryWatch() as memory:
            points = measure_point(config_of(policy), repetitions)
    utilisations = [utilisation(point, matrix_flop_per_s) for point in points]
    middle = sorted(utilisations)[len(utilisations) // 2]
    goal = Goal("model FLOP utilisation of the learner", middle, MODEL_FLOP_UTILISATION, at_least=True)
    figures = {
        "gpu": torch.cuda.get_device_name(),
        "matrix_flop_per_s": matrix_flop_per_s,
        "model_flop_utilisation": spread(utilisations),
        "learner_tokens_per_s": spread([point.learner_tokens_per_s for point in points]),
        "rollout_tokens_per_s": spread([point.rollout_tokens_per_s for point in points]),
        "sync_s": spread([point.sync_s for point in points]),
        "peak_memory_gib": memory.peak_bytes / 2**30,  # of the card: weights, engine's cache and activations
    }
    return Findings([goal], figures)


def config_of(policy: str) -> GrpoConfig:
    """A rank and an engine, each with a half of the card."""
    return GrpoConfig(
        policy=policy,
        group_size=8,
        groups_per_step=16,
        sampling=SamplingConfig(max_tokens=512),
        objective=ObjectiveConfig(kl_beta=0.0),
        engine=EngineConfig(max_model_len=3072, max_num_seqs=64, gpu_memory_utilization=0.45, num_gpus=0.5),
        learner=LearnerConfig(
            num_gpus_per_rank=0.5,
            dtype="bfloat16",
            lora=LoraConfig(rank=64, alpha=128, dropout=0.05),
            freeze_vision=True,
            gradient_checkpointing=True,
            micro_batch_tokens=16384,
        ),
        placement=PlacementConfig(gpus_per_node=1, colocate=True),
    )


def utilisation(point: Point, matrix_flop_per_s: float) -> float:
    """Model FLOPs of the learner's step per second, of the matrix rate."""
    tokens = point.learner_tokens + point.prompt_tokens
    return FLOPS_PER_WEIGHT * SHAPE.language_parameters * tokens / point.learner_s / matrix_flop_per_s


def _matrix_rate() -> float:
    """FLOP/s of a product in bfloat16."""
    import torch

    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    for _ in range(PRODUCTS):
        a @ b
    torch.cuda.synchronize()
    return PRODUCTS * 2 * SIDE**3 / (time.perf_counter() - started_s)


class _GpuMemoryWatch(Watch):
    """The most that all processes together take of the card."""

    def __init__(self, every_s: float = 0.5) -> None:
        super().__init__(every_s)
        self.peak_bytes = 0

    def sample(self) -> None:
        import torch

        free, total = torch.cuda.mem_get_info()
        self.peak_bytes = max(self.peak_bytes, total - free)
