"""The limits that a container or a service manager sets to this process, from Linux's control groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
UNLIMITED = 2**60  # bytes; version 1 states a number near 2**63 for none


@dataclass(frozen=True)
class Limits:
    """None = no limit."""

    memory_bytes: int | None
    cpus: float | None


def read_limits(root: Path = ROOT, membership: Path = MEMBERSHIP) -> Limits:
    """The tightest limits from the process's own group up to the root, of either version; none outside Linux."""
    groups = [line.split(":", 2) for line in _text(membership).splitlines() if line.count(":") >= 2]
    memory: list[int] = []
    cpus: list[float] = []
    for _, controllers, name in groups:
        for folder in _upwards(root, controllers, name):
            memory += filter(None, [_bytes(folder / "memory.max"), _bytes(folder / "memory.limit_in_bytes")])
            cpus += filter(None, [_cpus_v2(folder), _cpus_v1(folder)])
    return Limits(min(memory, default=None), min(cpus, default=None))


def _upwards(root: Path, controllers: str, name: str) -> Iterator[Path]:
    """The group's folder and those above it. Inside a container its own group is mounted as the root."""
    base = root if not controllers else root / controllers.split("=")[-1]
    group = base / name.lstrip("/")
    while group.is_relative_to(base) and group != base:
        yield group
        group = group.parent
    yield base


def _bytes(file: Path) -> int | None:
    text = _text(file)
    return int(text) if text.isdigit() and int(text) < UNLIMITED else None


def _cpus_v2(folder: Path) -> float | None:
    quota, _, period = _text(folder / "cpu.max").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _cpus_v1(folder: Path) -> float | None:
    quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
