"""The benchmarks of the paper: their files as published, what is asked, how replies are scored."""

from __future__ import annotations

from pathlib import Path

from sif_ray.evaluate.benchmarks.choices import MMBENCH, SEED
from sif_ray.evaluate.benchmarks.cvbench import CVBENCH
from sif_ray.evaluate.benchmarks.item import Benchmark
from sif_ray.evaluate.benchmarks.mmmu import MMMU
from sif_ray.evaluate.benchmarks.ovdeval import OVDEVAL
from sif_ray.evaluate.benchmarks.refcoco import REFCOCO
from sif_ray.evaluate.benchmarks.sat import SAT
from sif_ray.evaluate.benchmarks.spatialbench import SPATIALBENCH
from sif_ray.evaluate.benchmarks.viscot import VISCOT, VISCOT_DET
from sif_ray.evaluate.benchmarks.vqa import GQA, VQAV2
from sif_ray.evaluate.benchmarks.vstar import VSTAR
from sif_ray.evaluate.benchmarks.yesno import MME, POPE

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        VISCOT, VISCOT_DET, SPATIALBENCH, SAT, VSTAR, CVBENCH, REFCOCO, OVDEVAL,
        MME, MMBENCH, SEED, POPE, VQAV2, GQA, MMMU,
    )
}  # fmt: skip


def choose(name: str, annotations: Path) -> Benchmark:
    """The benchmark of that name; "viscot" with a file of JSON lines is its detection half.

    Raises `KeyError` for an unknown name.
    """
    if name == VISCOT.name and annotations.suffix == ".jsonl":
        return VISCOT_DET
    return BENCHMARKS[name]
