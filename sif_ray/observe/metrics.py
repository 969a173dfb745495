"""The scalars of a run, one line of JSON per step."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from sif_ray.observe import jsonl


class MetricsLog:
    """Appends `{"step": 3, "time_s": 1760000000.0, "reward/total": 1.84, ...}` to a file, flushed line by line.

    `tensorboard_dir` writes the same scalars as TensorBoard events too. A resumed run may log a step again: readers
    take the later line.

    Example: `MetricsLog("runs/grpo/metrics.jsonl").log(3, {"reward/total": 1.84})`.
    """

    def __init__(self, path: str | Path, tensorboard_dir: str | Path | None = None) -> None:
        self._file = jsonl.open_for_append(Path(path))
        self._board: Any = None
        if tensorboard_dir is not None:
            from tensorboard.summary import Writer

            self._board = Writer(str(tensorboard_dir))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One line for `step`, counted as the caller counts. A value that is not finite is written null."""
        reserved = {"step", "time_s"} & values.keys()
        if reserved:
            raise ValueError(f"metrics {sorted(reserved)} are written by the log itself; rename them")
        scalars = {name: float(value) for name, value in values.items()}
        self._file.write(jsonl.to_line({"step": int(step), "time_s": time.time(), **scalars}))
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close. Every line is already on its way to the file."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """One record per step, ascending; of a step logged twice the later line counts. null comes back as nan."""
    by_step = {int(line["step"]): line for line in jsonl.read(Path(path))}
    return [
        {name: float("nan") if value is None else value for name, value in by_step[step].items()}
        for step in sorted(by_step)
    ]
