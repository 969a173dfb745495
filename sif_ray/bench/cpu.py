"""The seconds that this process and all that it started spent computing, by the kind of process."""

from __future__ import annotations

import os
import time
from collections import defaultdict

import numpy as np
import psutil

from sif_ray.bench.watch import Watch


class CpuWatch(Watch):
    """Samples the CPU time of the process tree; what a process computes after its last sample is missed.

    Example: `with CpuWatch() as watch: work()`, then `watch.seconds`, e.g. {"ray::LearnerActor": 12.5}. Linux only.
    """

    def __init__(self, every_s: float = 2.0) -> None:
        super().__init__(every_s)
        self._first: dict[int, float] = {}
        self._spent: dict[int, tuple[str, float]] = {}
        self._totals: list[tuple[float, float]] = []  # unix time and `total_s` of every sample

    def sample(self) -> None:
        self._spent |= _spent()
        self._first = self._first or {pid: seconds for pid, (_, seconds) in self._spent.items()}
        self._totals.append((time.time(), self.total_s))

    @property
    def seconds(self) -> dict[str, float]:
        """CPU seconds by kind of process, most first."""
        found: dict[str, float] = defaultdict(float)
        for pid, (name, seconds) in self._spent.items():
            found[name] += seconds - self._first.get(pid, 0.0)
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    def cores(self, begin_s: float, end_s: float) -> float:
        """How many cores were at work between two unix times, in the mean."""
        begin, end = np.interp([begin_s, end_s], *zip(*self._totals, strict=True))
        return float((end - begin) / (end_s - begin_s))


def _spent() -> dict[int, tuple[str, float]]:
    own = psutil.Process()
    found = {}
    for process in (own, *own.children(recursive=True)):
        try:
            with process.oneshot():
                times, command = process.cpu_times(), process.cmdline()
        except psutil.NoSuchProcess:
            continue
        found[process.pid] = (_kind("this process" if process == own else " ".join(command)), times.user + times.system)
    return found


def _kind(command: str) -> str:
    """ "ray::LearnerActor.train" -> "ray::LearnerActor"; other programs by their file's name."""
    first = command.split(" ")[0] if command else "ended"
    return (
        first.split(".")[0]
        if first.startswith("ray::")
        else (command if command == "this process" else os.path.basename(first))
    )
