"""The memory of this process and of all that it started."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil


class MemoryWatch:
    """Samples the resident memory (RSS) of the process tree while the body runs. Memory that processes share, such as
    Ray's object store, counts once for each: what is told is an upper bound.

    Example: `with MemoryWatch() as watch: work()`, then `watch.peak_gib`.
    """

    def __init__(self, every_s: float = 1.0) -> None:
        self._every_s = every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)
        self.samples_gib: list[float] = []

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def peak_gib(self) -> float:
        return max(self.samples_gib)

    def _watch(self) -> None:
        own = psutil.Process()
        while True:
            processes = [own, *own.children(recursive=True)]
            self.samples_gib.append(sum(map(_rss_bytes, processes)) / 2**30)
            if self._ended.wait(self._every_s):
                return


def _rss_bytes(process: psutil.Process) -> int:
    try:
        rss: int = process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0
    return rss
