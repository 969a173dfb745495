"""The memory of this process and of all that it started."""

from __future__ import annotations

import psutil

from sif_ray.bench.watch import Watch


class MemoryWatch(Watch):
    """Samples the memory of the process tree: what it takes of the machine (PSS, where pages that processes share
    count once in all), and the plain sum of resident memory (RSS), in which every worker of Ray counts the object store
    again.

    Example: `with MemoryWatch() as watch: work()`, then `watch.peak_gib`. Linux only.
    """

    def __init__(self, every_s: float = 1.0) -> None:
        super().__init__(every_s)
        self.samples_gib: list[float] = []
        self.rss_samples_gib: list[float] = []

    @property
    def peak_gib(self) -> float:
        return max(self.samples_gib)

    def sample(self) -> None:
        own = psutil.Process()
        sizes = [_sizes_gib(process) for process in (own, *own.children(recursive=True))]
        self.samples_gib.append(sum(pss for pss, _ in sizes))
        self.rss_samples_gib.append(sum(rss for _, rss in sizes))


def _sizes_gib(process: psutil.Process) -> tuple[float, float]:
    """PSS and RSS; nothing of a process that has ended."""
    try:
        sizes = process.memory_full_info()
    except psutil.NoSuchProcess:
        return 0.0, 0.0
    return sizes.pss / 2**30, sizes.rss / 2**30
