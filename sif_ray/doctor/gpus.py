"""The GPUs of a machine, as the driver's tool `nvidia-smi` sees them."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sif_ray.doctor.finding import Finding, fault, note, ok
from sif_ray.doctor.need import GpuNeed

TIMEOUT_S = 15.0
FIELDS = ("index", "name", "memory.total", "memory.used", "driver_version", "compute_cap", "mig.mode.current")
FIRST_WITH_BFLOAT16 = 8.0  # compute capability (Ampere)
SMALLER_BY = 0.05  # share: a GPU of "80 GB" has 79.6 GiB
IDLE_MIB = 1024  # a GPU that nobody uses shows some memory all the same


class DriverError(RuntimeError):
    """`nvidia-smi` is there and does not work."""


@dataclass(frozen=True)
class Gpu:
    """One device. Example: `Gpu(0, "NVIDIA H100", 81559, 4, "550.54", 9.0, False)`."""

    index: int
    name: str
    memory_mib: int
    used_mib: int
    driver: str
    capability: float
    is_mig: bool
    """Cut into instances, each a device of its own."""


def find_gpus() -> list[Gpu]:
    """None on a machine without an NVIDIA driver. Raises `DriverError`."""
    tool = shutil.which("nvidia-smi")
    return [] if tool is None else parse(_ask(tool, f"--query-gpu={','.join(FIELDS)}"))


def find_users() -> str:
    """The processes that hold memory of GPUs, in words; "" where the driver names none, as inside a container."""
    tool = shutil.which("nvidia-smi")
    lines = [] if tool is None else _ask(tool, "--query-compute-apps=pid,used_memory").splitlines()
    return ", ".join(
        f"process {pid.strip()} ({used.strip()} MiB)" for pid, _, used in (x.partition(",") for x in lines)
    )


def _ask(tool: str, query: str) -> str:
    try:
        done = subprocess.run(
            [tool, query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise DriverError(f"nvidia-smi did not answer within {TIMEOUT_S:g} s") from error
    if done.returncode:
        raise DriverError(f"nvidia-smi failed: {(done.stdout + done.stderr).strip()[:300]}")
    return done.stdout


def parse(text: str) -> list[Gpu]:
    """GPUs of `nvidia-smi --query-gpu=FIELDS --format=csv,noheader,nounits`."""
    return [
        Gpu(
            int(index),
            name,
            _number(total),
            _number(used),
            driver,
            float(capability) if capability[:1].isdigit() else 0.0,
            mig == "Enabled",
        )
        for index, name, total, used, driver, capability, mig in csv.reader(io.StringIO(text), skipinitialspace=True)
    ]


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0  # "[N/A]" of a device that does not tell


def gpu_findings(gpus: Sequence[Gpu], need: GpuNeed, users: str = "") -> Iterator[Finding]:
    """What of one machine's `gpus` is not as a run needs them; `users` are the processes on them in words."""
    if not gpus:
        yield ok("GPUs", "none")
        return
    names = sorted({f"{gpu.name}, {gpu.memory_mib / 1024:.1f} GiB" for gpu in gpus})
    yield ok("GPUs", f"{len(gpus)} ({'; '.join(names)}), driver {gpus[0].driver}")
    yield from _occupied(gpus, need, users)
    old = [gpu for gpu in gpus if 0 < gpu.capability < FIRST_WITH_BFLOAT16]
    if old:
        say = fault if need.bfloat16 else note
        yield say(
            "GPUs: bfloat16",
            f"GPU {_indices(old)} has compute capability {old[0].capability:g}, bfloat16 begins with 8.0 (Ampere)",
            "take newer GPUs; the dtypes of learner and engine are bfloat16 there",
        )
    if small := [gpu for gpu in gpus if 0 < gpu.memory_mib < need.memory_gib * 1024 * (1 - SMALLER_BY)]:
        yield fault(
            "GPUs: memory",
            f"GPU {_indices(small)} has {small[0].memory_mib / 1024:.1f} GiB, placement.gpu_memory_gib says "
            f"{need.memory_gib:g}",
            "set placement.gpu_memory_gib to what they have, so that the plan (--dry-run) is judged by it",
        )
    if cut := [gpu for gpu in gpus if gpu.is_mig]:
        yield note(
            "GPUs: MIG",
            f"GPU {_indices(cut)} is cut into MIG instances, between which NCCL does not work",
            "switch MIG off for learners of several ranks and engines of several workers",
        )


def _occupied(gpus: Sequence[Gpu], need: GpuNeed, users: str) -> Iterator[Finding]:
    used = [gpu for gpu in gpus if gpu.used_mib > IDLE_MIB]
    if used:
        say = fault if need.count else note
        memory = ", ".join(f"GPU {gpu.index}: {gpu.used_mib / 1024:.1f} GiB" for gpu in used)
        yield say(
            "GPUs: in use",
            f"others hold memory of them ({memory}){f': {users}' if users else ''}",
            "end those processes, or leave their GPUs out by CUDA_VISIBLE_DEVICES before Ray starts",
        )


def count_findings(found: int, need: GpuNeed, place: str = "this machine") -> Iterator[Finding]:
    if need.count > found:
        yield fault(
            "GPUs: count",
            f"the run wants {need.count:g}, {place} has {found}",
            "start fewer engines and ranks (num_engines, learner.num_ranks, actors_min), or join a larger cluster "
            "(ray.address)",
        )


def _indices(gpus: Sequence[Gpu]) -> str:
    return ", ".join(str(gpu.index) for gpu in gpus)
