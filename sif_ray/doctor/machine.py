"""One machine: shared memory, memory, processors, open files and room on its disks."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from sif_ray.doctor.cgroup import Limits, read_limits
from sif_ray.doctor.finding import Finding, fault, note, ok
from sif_ray.doctor.need import Need
from sif_ray.policy.fetch import CACHE_ENV

GIB, MIB = 2**30, 2**20
SHARED_MEMORY = Path("/dev/shm")
NCCL_SHARED_BYTES = GIB  # for the buffers between processes of one machine; containers start with 64 MiB
FEWEST_FILES, ENOUGH_FILES = 8192, 65536
FULL, NEARLY_FULL = (
    0.95,
    0.90,
)  # share of a disk; beyond the first Ray makes no objects there (local_fs_capacity_threshold)


@dataclass(frozen=True)
class Machine:
    """What is measured, so that what follows from it can be told from figures."""

    memory_bytes: int
    free_memory_bytes: int
    cpus: int
    limits: Limits
    shared_bytes: int | None  # of /dev/shm; None where there is none
    shared_free_bytes: int
    open_files: tuple[int, int]  # soft and hard limit


def measure() -> Machine:
    import resource

    memory = psutil.virtual_memory()
    shared = shutil.disk_usage(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
    return Machine(
        memory.total,
        memory.available,
        os.cpu_count() or 1,
        read_limits(),
        shared.total if shared else None,
        shared.free if shared else 0,
        resource.getrlimit(resource.RLIMIT_NOFILE),
    )


def machine_findings(machine: Machine, need: Need, *, has_gpus: bool) -> Iterator[Finding]:
    yield from _shared_memory(machine, need, has_gpus=has_gpus)
    yield from _memory(machine, need)
    yield from _cpus(machine, need)
    yield from _open_files(machine)


def _shared_memory(machine: Machine, need: Need, *, has_gpus: bool) -> Iterator[Finding]:
    check = "shared memory"
    if machine.shared_bytes is None:
        yield note(check, "no /dev/shm: Ray keeps its objects on a disk", "run on Linux for anything large")
        return
    wanted, why = need.store_mib * MIB, f"ray.object_store_mib = {need.store_mib}"
    if has_gpus and wanted < NCCL_SHARED_BYTES:
        wanted, why = NCCL_SHARED_BYTES, "NCCL between the GPUs of a machine"
    fix = (
        "give the container more (docker run --shm-size=8g; on Kubernetes an emptyDir with medium: Memory at "
        "/dev/shm), or lower ray.object_store_mib"
    )
    if machine.shared_bytes < wanted:
        yield fault(check, f"/dev/shm has {_gib(machine.shared_bytes)}, {why} wants {_gib(wanted)}", fix)
    elif machine.shared_free_bytes < wanted:
        yield fault(
            check,
            f"/dev/shm has {_gib(machine.shared_free_bytes)} free of {_gib(machine.shared_bytes)}, {why} wants "
            f"{_gib(wanted)}",
            f"remove what programs that died left in /dev/shm, or {fix}",
        )
    else:
        yield ok(check, f"/dev/shm has {_gib(machine.shared_bytes)}, {_gib(machine.shared_free_bytes)} free")


def _memory(machine: Machine, need: Need) -> Iterator[Finding]:
    check, limit = "memory", machine.limits.memory_bytes
    bounded = limit is not None and limit < machine.memory_bytes
    total = min(limit or machine.memory_bytes, machine.memory_bytes)
    of = f"{_gib(total)}, the limit of its control group" if bounded else _gib(total)
    wanted = f"the run takes at least {_gib(need.memory_bytes)}"
    if need.memory_bytes > total:
        yield fault(
            check,
            f"{of}; {wanted}",
            "raise the container's memory (resources.limits.memory), or lower num_engines, engine.kv_cache_gib, "
            "learner.num_ranks or ray.object_store_mib",
        )
    elif need.memory_bytes > machine.free_memory_bytes:
        free = f"{_gib(machine.free_memory_bytes)} are free now of {of}"
        yield note(check, f"{free}; {wanted}", "end other programs before the run starts")
    else:
        yield ok(check, of + (f"; {wanted}" if need.memory_bytes else ""))


def _cpus(machine: Machine, need: Need) -> Iterator[Finding]:
    limit = machine.limits.cpus
    available = min(limit or machine.cpus, machine.cpus)
    told = f"{available:g}" + (
        f", the limit of its control group (of {machine.cpus})" if available < machine.cpus else ""
    )
    if available < min(need.threads, 1) or (limit is not None and limit < 1):
        yield fault("CPUs", told, "give the container at least one whole CPU (resources.limits.cpu)")
    elif available < need.threads:
        yield note(
            "CPUs",
            f"{told}; the run computes on {need.threads} threads",
            "it will be slow: raise the container's CPUs, or lower learner.threads, engine.threads or num_engines",
        )
    else:
        yield ok("CPUs", told)


def _open_files(machine: Machine) -> Iterator[Finding]:
    soft, hard = machine.open_files
    infinite = hard < 0 or hard > 2**31
    told = f"{soft} open files, at most {'any number' if infinite else hard}"
    if not infinite and hard < FEWEST_FILES:
        yield fault(
            "open files", told, f"raise the hard limit to {ENOUGH_FILES} (ulimit -Hn, LimitNOFILE of the service)"
        )
    elif not infinite and hard < ENOUGH_FILES:
        yield note("open files", told, f"raise the hard limit to {ENOUGH_FILES} for many nodes or actors")
    else:
        yield ok("open files", told)  # Ray raises the soft limit by itself


# --- disks -----------------------------------------------------------------------------------------------------------


def working_folders(environ: Mapping[str, str]) -> dict[str, Path]:
    """Where Ray spills objects and keeps its logs, and where downloaded models are kept."""
    cache = Path(environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return {
        "Ray's folder": Path(environ.get("RAY_TMPDIR", tempfile.gettempdir())),
        "cache of the model hub": Path(environ.get("HF_HOME", cache / "huggingface")),
        "cache of policies": Path(environ.get(CACHE_ENV, Path.home() / ".cache" / "sif_ray")),
    }


def disk_findings(name: str, folder: Path) -> Iterator[Finding]:
    """How full the disk of a folder is, which need not exist yet."""
    usage = shutil.disk_usage(existing(folder))
    share = 1 - usage.free / usage.total
    told = f"{usage.free / 1e9:.1f} GB free of {usage.total / 1e9:.1f} GB ({folder})"
    fix = "make room, or name another disk (RAY_TMPDIR, HF_HOME, SIF_RAY_CACHE)"
    if share > FULL:
        yield fault(f"disk: {name}", f"{told}; Ray makes no objects on a disk that is {FULL:.0%} full", fix)
    elif share > NEARLY_FULL:
        yield note(f"disk: {name}", told, fix)
    else:
        yield ok(f"disk: {name}", told)


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    path = path.expanduser().absolute()
    while not path.exists():
        path = path.parent
    return path


def _gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB"
