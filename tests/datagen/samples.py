"""Real rows of the annotation files, which lie beside a checkout on some machines, with stand-ins for their images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

SAMPLES = Path(__file__).parents[2] / "../shared/samples"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="no real rows beside this checkout")

NAMES = sorted(path.stem for path in SAMPLES.glob("viscot/benchmark/*.json"))
REC_FILES = sorted(path.name for path in SAMPLES.glob("rec/*.jsonl"))


def conversations(name: str) -> list[dict[str, Any]]:
    """Rows of a benchmark file of Visual-CoT."""
    rows: list[dict[str, Any]] = json.loads((SAMPLES / f"viscot/benchmark/{name}.json").read_text(encoding="utf-8"))
    return rows


def detections(name: str) -> list[dict[str, Any]]:
    """Rows of its detection file, which are of the same questions in the same order, with boxes and sizes in pixels."""
    return lines(SAMPLES / f"viscot/benchmark_det/{name}.jsonl")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw_stand_in(path: Path, width: int, height: int) -> None:
    """A picture of that size, with one bit per pixel: some are pages of 35 million."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("1", (width, height)).save(path, "PNG", compress_level=1)
