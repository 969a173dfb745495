"""Processes that a run which died has left: they hold memory, also of GPUs, and nobody will end them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import psutil

from sif_ray.doctor.finding import Finding, fault, note, ok
from sif_ray.rollout.orphans import OWNER_VARIABLE

ENGINE_TITLE = "VLLM::"
OWNERS = ("python", "vllm", "ray::", "raylet")  # a program that starts engines has one of these in its command
CLUSTER = "gcs_server"


@dataclass(frozen=True)
class Process:
    """A process of this user. `owner`: of its engine, by `OWNER_VARIABLE`; 0 = not stated."""

    pid: int
    parent: int
    command: str
    owner: int = 0


def own_processes() -> list[Process]:
    """All processes of this user."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.uids().real == os.getuid():
                command = " ".join(process.cmdline()) or process.name()
                found.append(Process(process.pid, process.ppid(), command, _owner(process)))
    return found


def _owner(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error, ValueError, OSError):
        return int(process.environ().get(OWNER_VARIABLE, 0))
    return 0


def leftover_findings(processes: Sequence[Process], clusters_expected: int = 0) -> Iterator[Finding]:
    """Engines without the program that started them, and more clusters than there should be."""
    by_pid = {process.pid: process for process in processes}
    engines = [process for process in processes if _is_orphan(process, by_pid)]
    for engine in engines:
        yield fault(
            "leftover processes",
            f"process {engine.pid} ({engine.command[:60]}) is an engine whose owner died; it holds its memory",
            f"kill {engine.pid}",
        )
    clusters = [process for process in processes if CLUSTER in process.command.split(" ")[0]]
    if len(clusters) > clusters_expected:
        yield note(
            "leftover processes",
            f"{len(clusters)} Ray cluster(s) of this user run here (process {clusters[0].pid})",
            "ray.address=auto joins one; if nobody uses it, end it where it was started",
        )
    elif not engines:
        yield ok("leftover processes", "none")


def _is_orphan(process: Process, by_pid: Mapping[int, Process]) -> bool:
    """An engine's process whose stated owner is gone, or below no program that could have started it."""
    if process.owner and process.owner not in by_pid:
        return True
    if not process.command.startswith(ENGINE_TITLE):
        return False
    parent = by_pid.get(process.parent)
    return parent is None or not any(
        word in parent.command.lower() or parent.command.startswith(ENGINE_TITLE) for word in OWNERS
    )
