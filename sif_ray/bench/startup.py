"""The suite `startup`: from the start of the process of `sif-ray grpo` to its first trained step, and what took it.

A small run of the real job; the parts are those of its own timelines (`startup.jsonl`, `timeline.jsonl`). Seconds are
figures without a goal, since they are the machine's. Goals are that an engine and the learner start at the same time,
and that there is no moment in which nothing is at work.
"""

from __future__ import annotations

import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sif_ray.bench.findings import Findings, Goal, interleaved, spread
from sif_ray.bench.startup_figure import startup_svg
from sif_ray.bench.toy_dataset import write_dataset
from sif_ray.loop.stage import STARTUP
from sif_ray.observe.timeline import Span, merge_intervals, read_timeline

log = logging.getLogger(__name__)

OVERLAP = 0.9
AT_WORK = 0.95

JOB = "from sif_ray.cli import run_job; raise SystemExit(run_job('grpo'))"  # as jobs/grpo.py


@dataclass(frozen=True)
class Load:
    """How small a run."""

    num_engines: int = 1
    groups_per_step: int = 4
    group_size: int = 8
    max_tokens: int = 64


def measure(repetitions: int, load: Load = Load()) -> Findings:
    """The timelines of so many starts."""
    with tempfile.TemporaryDirectory(prefix="sif_ray-bench-") as name:
        folder = Path(name)
        write_dataset(folder / "data", load.groups_per_step)
        runs = interleaved({"grpo": partial(start, folder, load)}, repetitions)["grpo"]
    parts = [seconds_of(spans) for spans in runs]
    overlaps = [overlap(spans, "engine 0", "learner 0") for spans in runs]
    shares = [share_at_work(spans) for spans in runs]
    goals = [
        Goal(
            "share of an engine's or the learner's start, the shorter, beside the other",
            statistics.median(overlaps),
            OVERLAP,
            at_least=True,
        ),
        Goal(
            "share of the time to the first step in which something is at work",
            statistics.median(shares),
            AT_WORK,
            at_least=True,
        ),
    ]
    totals = [run["total"] for run in parts]
    middle = runs[totals.index(statistics.median_low(totals))]
    figures = {
        "load": asdict(load),
        "seconds": {part: spread([run[part] for run in parts]) for part in parts[0]},
        "timeline": [_row(span) for span in middle],
    }
    return Findings(goals, figures, startup_svg(middle))


def start(folder: Path, load: Load) -> list[Span]:
    """Train one step of a new run; its spans up to there, in seconds since the process was started."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        settings = {
            "data": folder / "data",
            "split": "grpo",
            "policy": "toy",
            "output": f"{output}/run",
            "max_steps": 1,
            "num_engines": load.num_engines,
            "groups_per_step": load.groups_per_step,
            "group_size": load.group_size,
            "sampling.max_tokens": load.max_tokens,
            "engine.max_model_len": 512,
            "engine.kv_cache_gib": 0.25,
        }
        command = [sys.executable, "-c", JOB, *(f"{key}={value}" for key, value in settings.items())]
        started_s = time.time()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the run failed with status {done.returncode}:\n{done.stderr}")
        spans = [span for name in (STARTUP, "timeline.jsonl") for span in read_timeline(Path(output) / "run" / name)]
    trained_s = min(span.end_s for span in spans if span.kind == "train")
    shifted = [replace(span, start_s=span.start_s - started_s, end_s=span.end_s - started_s) for span in spans]
    until = sorted(
        (span for span in shifted if span.end_s <= trained_s - started_s), key=lambda span: (span.start_s, span.end_s)
    )
    log.info("bench startup: first step after %.1f s", trained_s - started_s)
    return until


def seconds_of(spans: Sequence[Span]) -> dict[str, float]:
    """Seconds of every part, and "total"."""
    starts = {
        f"{span.lane}: {span.labels['what']}" if "what" in span.labels else f"{span.lane}: start": span.end_s
        - span.start_s
        for span in spans
        if span.kind == "start"
    }
    begun_s = max(span.end_s for span in spans if span.kind == "start")
    works = {f"first {kind}": [span for span in spans if span.kind == kind] for kind in ("generate", "score", "train")}
    firsts = {name: found[0].end_s - found[0].start_s for name, found in works.items()}
    total_s = max(span.end_s for span in spans)
    return {**starts, **firsts, "from the last start": total_s - begun_s, "total": total_s}


def overlap(spans: Iterable[Span], first: str, second: str) -> float:
    """How much of the shorter of two starts lies beside the other, in [0, 1]."""
    a, b = (next(span for span in spans if span.lane == lane and span.kind == "start") for lane in (first, second))
    shared_s = min(a.end_s, b.end_s) - max(a.start_s, b.start_s)
    return max(shared_s, 0.0) / min(a.end_s - a.start_s, b.end_s - b.start_s)


def share_at_work(spans: Sequence[Span]) -> float:
    """Share of the time since the process was started in which any lane starts or works."""
    busy = merge_intervals((max(span.start_s, 0.0), span.end_s) for span in spans if span.kind != "wait")
    return sum(end_s - start_s for start_s, end_s in busy) / max(span.end_s for span in spans)


def _row(span: Span) -> dict[str, Any]:
    seconds = {"start_s": round(span.start_s, 2), "end_s": round(span.end_s, 2)}
    return {"lane": span.lane, "kind": span.labels.get("what", span.kind), **seconds}
