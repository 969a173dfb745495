"""The scalars of a run, one line of JSON per step, and the trackers that get them too."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

from sif_ray.observe import jsonl
from sif_ray.observe.background import Background

MAX_STEPS_BEHIND = 1000  # of a tracker that is slower than the run


class Tracker(Protocol):
    """Where scalars go beside the file (`sif_ray.observe.trackers`). Its methods are called from one thread."""

    name: str

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, ok: bool) -> None:
        """The run has ended, in order or not."""
        ...


class MetricsLog:
    """Appends `{"step": 3, "time_s": 1760000000.0, "reward/total": 1.84, ...}` to a file, flushed line by line.

    Each of the `trackers` gets the same scalars in a thread of its own: one that is slow or fails costs the run nothing
    but its own lines (see `Background`). A resumed run may log a step again: readers take the later line.

    Example: `MetricsLog("runs/grpo/metrics.jsonl").log(3, {"reward/total": 1.84})`.
    """

    def __init__(self, path: str | Path, trackers: Sequence[Tracker] = ()) -> None:
        self._file = jsonl.open_for_append(Path(path))
        self._trackers = [(tracker, Background(f"tracker {tracker.name}", MAX_STEPS_BEHIND)) for tracker in trackers]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One line for `step`, counted as the caller counts. A value that is not finite is written null."""
        reserved = {"step", "time_s"} & values.keys()
        if reserved:
            raise ValueError(f"metrics {sorted(reserved)} are written by the log itself; rename them")
        scalars = {name: float(value) for name, value in values.items()}
        self._file.write(jsonl.to_line({"step": int(step), "time_s": time.time(), **scalars}))
        for tracker, background in self._trackers:
            background.submit(tracker.log, int(step), scalars)

    def close(self, ok: bool = True) -> None:
        """Flush and close. Every line is already on its way to the file; trackers are told whether the run is `ok`."""
        self._file.close()
        for tracker, background in self._trackers:
            background.submit(tracker.close, ok)
        for _, background in self._trackers:
            background.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(ok=kind is None)


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """One record per step, ascending; of a step logged twice the later line counts. null comes back as nan."""
    by_step = {int(line["step"]): line for line in jsonl.read(Path(path))}
    return [
        {name: float("nan") if value is None else value for name, value in by_step[step].items()}
        for step in sorted(by_step)
    ]
