"""Numbers that others have published, each with its source. They are never mixed with measured ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class Reference:
    """One model's numbers on one benchmark.

    Example: `Reference("ovdeval", "VLM-R1 3B", {"overall": 31.01, "color": 4.5}, "NMS-AP in %", "VLM-R1 blog")`.
    """

    benchmark: str
    model: str
    scores: dict[str, float]  # by group of the benchmark's first table
    unit: str
    source: str


def references(benchmark: str) -> list[Reference]:
    """What is published about a benchmark, in the order of the file."""
    table = json.loads(files("sif_ray.evaluate").joinpath("reference.json").read_text(encoding="utf-8"))
    return [found for found in (Reference(**row) for row in table) if found.benchmark == benchmark]
