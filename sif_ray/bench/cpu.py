"""The seconds that this process and all that it started spent computing, by the kind of process."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from types import TracebackType

import psutil


class CpuWatch:
    """Samples the CPU time of the process tree while the body runs; what a process computes after its last sample is
    missed.

    Example: `with CpuWatch() as watch: work()`, then `watch.seconds`, e.g. {"ray::LearnerActor": 12.5}. Linux only.
    """

    def __init__(self, every_s: float = 2.0) -> None:
        self._every_s = every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="cpu-watch", daemon=True)
        self._first: dict[int, float] = {}
        self._spent: dict[int, tuple[str, float]] = {}

    def __enter__(self) -> CpuWatch:
        self._first = {pid: seconds for pid, (_, seconds) in _spent().items()}
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._spent |= _spent()

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

    def _watch(self) -> None:
        while not self._ended.wait(self._every_s):
            self._spent |= _spent()


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
