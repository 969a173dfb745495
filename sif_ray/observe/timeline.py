"""Who was busy when: spans of engines, reward workers, learner ranks and weight transfers on one time axis."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sif_ray.observe import jsonl

KINDS = ("generate", "train", "score", "sync", "wait", "start")


@dataclass(frozen=True)
class Span:
    """One stretch of work. Spans of a lane may overlap: an engine generates for many prompts at once.

    Example: `Span("engine 0", "generate", 1760000000.0, 1760000001.2, {"step": 3})`.
    """

    lane: str  # "engine 0", "learner 0", "reward 0", "sync"
    kind: str  # one of KINDS; "start" stands in a file of its own, so that shares are of the work
    start_s: float  # unix seconds
    end_s: float
    labels: dict[str, Any] = field(default_factory=dict)


class Timeline:
    """Spans of a run, appended to a JSONL file as they end.

    Example: `timeline.span("engine 0", "generate", start_s, time.time(), step=3)`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = jsonl.open_for_append(self.path)

    def span(self, lane: str, kind: str, start_s: float, end_s: float, **labels: Any) -> None:
        """Append one span, times in unix seconds. `ValueError` for an unknown kind or an end before the start."""
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} of a span on lane {lane!r} is unknown; use one of {', '.join(KINDS)}")
        if not start_s <= end_s:
            raise ValueError(f"span {kind!r} on lane {lane!r} ends at {end_s} before it starts at {start_s}")
        record = {"lane": lane, "kind": kind, "start_s": float(start_s), "end_s": float(end_s), **labels}
        self._file.write(jsonl.to_line(record))

    def busy_share(self, lane: str, kinds: Collection[str]) -> float:
        """`busy_share` of everything written so far."""
        self._file.flush()
        return busy_share(read_timeline(self.path), lane, kinds)

    def close(self) -> None:
        """Close the file; every span is already in it."""
        self._file.close()


def read_timeline(path: str | Path) -> list[Span]:
    """Every span of the file, in the order written."""
    named = ("lane", "kind", "start_s", "end_s")
    return [
        Span(**{name: line[name] for name in named}, labels={name: line[name] for name in line.keys() - set(named)})
        for line in jsonl.read(Path(path))
    ]


def merge_intervals(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of (start, end) intervals as disjoint ones, ascending."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def busy_share(spans: Collection[Span], lane: str, kinds: Collection[str]) -> float:
    """Share in [0, 1] of the whole timeline (first start to last end, all lanes) in which `lane` does one of `kinds`.

    Overlapping spans count once. 0.0 for a timeline without extent.
    """
    if not spans:
        return 0.0
    extent_s = max(span.end_s for span in spans) - min(span.start_s for span in spans)
    busy = merge_intervals((span.start_s, span.end_s) for span in spans if span.lane == lane and span.kind in kinds)
    return _length(busy) / extent_s if extent_s > 0 else 0.0


def overlap_share(
    spans: Collection[Span], first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]]
) -> float:
    """Share of the whole timeline in which both lie, given as disjoint intervals (`merge_intervals`)."""
    if not spans:
        return 0.0
    extent_s = max(span.end_s for span in spans) - min(span.start_s for span in spans)
    # |A and B| = |A| + |B| - |A or B|
    shared_s = _length(first) + _length(second) - _length(merge_intervals([*first, *second]))
    return shared_s / extent_s if extent_s > 0 else 0.0


def _length(intervals: Iterable[tuple[float, float]]) -> float:
    return sum(end - start for start, end in intervals)
