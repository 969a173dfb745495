"""What a tree of processes and its own Ray cluster hold of the machine."""

from __future__ import annotations

import contextlib
import re
import urllib.request
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import psutil

from sif_ray.chaos.process_tree import GCS, ProcessTree

_PROCESS = re.compile(r'(?<=[{,])(replica|replica_id|handle|WorkerId|actor_id|pid)="[^"]*",?')
"""Labels that name a process. Ray's agent keeps counters and histograms of those that have died until its node ends."""


@dataclass(frozen=True)
class Footprint:
    """Sums over all processes of a tree at one time."""

    memory_mb_of: Mapping[str, float]  # by kind of process; each has its part of a page that several share
    file_handles: int
    processes: int
    threads: int
    object_store_mb: float | None  # in use, in memory or spilled; None = the cluster did not say
    series: int | None  # at the Prometheus endpoint of the Ray node, apart from which process each is of

    @property
    def memory_mb(self) -> float:
        """Of all processes."""
        return sum(self.memory_mb_of.values())

    @classmethod
    def of(cls, tree: ProcessTree) -> Footprint:
        """A process that ends meanwhile does not count."""
        memory_mb_of: Counter[str] = Counter()
        file_handles = processes = threads = 0
        for process in tree.alive():
            with contextlib.suppress(psutil.Error):
                held_bytes = process.memory_full_info().pss
                num_fds, num_threads, kind = process.num_fds(), process.num_threads(), _kind(process)
                memory_mb_of[kind] += held_bytes / 1e6
                file_handles += num_fds
                threads += num_threads
                processes += 1
        store_bytes, series = _cluster(tree)
        store_mb = None if store_bytes is None else store_bytes / 1e6
        return cls(memory_mb_of, file_handles, processes, threads, store_mb, series)


def _kind(process: psutil.Process) -> str:
    """What a process is, the same for the one that takes its place: its title without the method that runs, or the
    script or program."""
    words = process.cmdline() or [process.name()]
    title = words[0].split()[0]
    if "::" in title:
        return title.partition(".")[0]
    return next((Path(word).name for word in words if word.endswith(".py")), Path(title).name)


def _cluster(tree: ProcessTree) -> tuple[float | None, int | None]:
    """Bytes in the object store and number of series, by what Prometheus would read from the cluster's only node."""
    try:
        exported = _exported(tree)
    except (psutil.Error, OSError, HTTPException):
        return None, None
    used = re.findall(r"^ray_object_store_memory\{.*\} (\S+)$", exported, re.MULTILINE)
    series = {_PROCESS.sub("", name) for name in re.findall(r"^([^#].*) \S+$", exported, re.MULTILINE)}
    return sum(map(float, used)) if used else None, len(series) or None


def _exported(tree: ProcessTree) -> str:
    """ "" where there is no cluster."""
    for gcs in tree.processes(GCS):
        options = dict(word.split("=", 1) for word in gcs.cmdline() if word.startswith("--") and "=" in word)
        for port in Path(options["--session-dir"]).glob("metrics_export_port_*"):
            address = f"http://{options['--node-ip-address']}:{port.read_text().strip()}/metrics"
            with urllib.request.urlopen(address, timeout=10) as reply:
                return str(reply.read().decode())
    return ""
