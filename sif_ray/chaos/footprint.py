"""What a tree of processes and its own Ray cluster hold of the machine."""

from __future__ import annotations

import contextlib
import re
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import psutil

from sif_ray.chaos.process_tree import ProcessTree


@dataclass(frozen=True)
class Footprint:
    """Sums over all processes of a tree at one time."""

    memory_mb: float  # a page that several processes share counts once: each has its part of it
    file_handles: int
    processes: int
    threads: int
    object_store_mb: float  # in use, in memory or spilled
    series: int  # at the Prometheus endpoint of the Ray node

    @classmethod
    def of(cls, tree: ProcessTree) -> Footprint:
        """A process that ends meanwhile does not count, nor do figures of a cluster that does not answer now."""
        memory_bytes = file_handles = processes = threads = 0
        for process in tree.alive():
            with contextlib.suppress(psutil.Error):
                held_bytes, num_fds, num_threads = (
                    process.memory_full_info().pss,
                    process.num_fds(),
                    process.num_threads(),
                )
                memory_bytes += held_bytes
                file_handles += num_fds
                threads += num_threads
                processes += 1
        exported = _exported(tree)
        store_bytes = sum(map(float, re.findall(r"^ray_object_store_memory\{.*\} (\S+)$", exported, re.MULTILINE)))
        series = len(re.findall(r"^[^#]", exported, re.MULTILINE))
        return cls(memory_bytes / 1e6, file_handles, processes, threads, store_bytes / 1e6, series)


def _exported(tree: ProcessTree) -> str:
    """What Prometheus would read from the cluster's only node; "" when it does not answer."""
    with contextlib.suppress(psutil.Error, OSError):
        for gcs in tree.processes("gcs/gcs_server"):
            for word in gcs.cmdline():
                if word.startswith("--session-dir="):
                    (port,) = Path(word.removeprefix("--session-dir=")).glob("metrics_export_port_*")
                    address = f"http://{_address(gcs)}:{port.read_text().strip()}/metrics"
                    with urllib.request.urlopen(address, timeout=10) as reply:
                        return str(reply.read().decode())
    return ""


def _address(gcs: psutil.Process) -> str:
    words = gcs.cmdline()
    return next(word.partition("=")[2] for word in words if word.startswith("--node-ip-address="))
