"""What is looked at on every machine of a run: on this one, or on each node of a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from sif_ray.doctor import gpus, keys, leftovers, machine, nccl, torch_build, versions
from sif_ray.doctor.checkup import Check, examine
from sif_ray.doctor.endpoints import endpoint_findings
from sif_ray.doctor.finding import Finding, fault, ok
from sif_ray.doctor.need import Need
from sif_ray.doctor.redaction import secrets_in

TORCH_LIMIT_S = torch_build.LIMIT_S + 5.0


@dataclass(frozen=True)
class NodeReport:
    """What one node says of itself."""

    findings: tuple[Finding, ...]
    versions: Mapping[str, str]  # that must be equal on all nodes
    seen: Mapping[str, bool]  # by path: whether it is there


def examine_node(need: Need, paths: tuple[str, ...] = ()) -> NodeReport:
    """Everything about the machine of this process, and which of `paths` it sees. For a Ray task."""
    findings = examine([*process_checks(need), *machine_checks(need)], secrets(need))
    return NodeReport(tuple(findings), versions.compared_versions(), {path: Path(path).exists() for path in paths})


def secrets(need: Need) -> tuple[str, ...]:
    """What is never to be shown of this process's environment."""
    return secrets_in(os.environ, {variable for _, variable in need.key_variables})


def process_checks(need: Need) -> list[Check]:
    """What may differ between processes of one machine: interpreter, packages, keys, ways to the endpoints."""
    return [
        Check("packages", lambda: _packages(need)),
        *_each("key", need.key_variables, lambda key: _key(*key)),
        *_each("endpoint", need.endpoints, lambda endpoint: endpoint_findings(endpoint, os.environ)),
    ]


def machine_checks(need: Need) -> list[Check]:
    """What is the same for all processes of one machine."""
    return [
        Check("machine", lambda: _machine(need)),
        Check("GPUs", lambda: _gpus(need)),
        Check("torch", lambda: _torch(need), TORCH_LIMIT_S),
        Check("NCCL variables", lambda: nccl.variable_findings(os.environ, psutil.net_if_addrs())),
        Check("leftover processes", lambda: _leftovers(need)),
        *[
            Check(f"disk: {name}", partial(machine.disk_findings, name, folder))
            for name, folder in machine.working_folders(os.environ).items()
        ],
    ]


def _each(kind: str, items: tuple, find: Callable) -> list[Check]:
    return [Check(f"{kind} {number}", partial(find, item)) for number, item in enumerate(items, 1)]


def _packages(need: Need) -> Iterator[Finding]:
    wanted = versions.declared()
    yield from versions.python_findings(wanted)
    yield from versions.package_findings(wanted, need.extras)
    yield from versions.engine_findings(wanted, needs_engine=need.engine, on_gpus=need.gpus.count > 0)


def _key(field: str, variable: str) -> Iterator[Finding]:
    yield from keys.key_findings(field, variable, os.environ, lines=field == "api_keys_env")


def _machine(need: Need) -> Iterator[Finding]:
    try:
        has_gpus = bool(gpus.find_gpus())
    except gpus.DriverError:  # told by the check of the GPUs
        has_gpus = True
    yield from machine.machine_findings(machine.measure(), need, has_gpus=has_gpus)


def _gpus(need: Need) -> Iterator[Finding]:
    try:
        found = gpus.find_gpus()
        users = gpus.find_users() if found else ""
    except gpus.DriverError as error:
        fix = "restart the machine after an update of the driver, or install the driver again"
        yield fault("GPUs", str(error), fix)
        return
    yield from gpus.gpu_findings(found, need.gpus, users)
    if need.is_local:
        yield from gpus.count_findings(len(found), need.gpus)
        yield from _logical_cpus(need)


def _torch(need: Need) -> Iterator[Finding]:
    try:
        number = len(gpus.find_gpus())
    except gpus.DriverError:
        number = 0
    uses_gpus = need.gpus.count > 0 and need.is_local  # of a cluster not every node has some
    yield from torch_build.torch_findings(torch_build.probe_torch(), number, run_uses_gpus=uses_gpus)


def _leftovers(need: Need) -> Iterator[Finding]:
    clusters_expected = 0 if need.is_local else 1  # on the head of the one that is joined
    yield from leftovers.leftover_findings(leftovers.own_processes(), clusters_expected)


def _logical_cpus(need: Need) -> Iterator[Finding]:
    if need.cpus > need.local_cpus > 0:
        yield fault(
            "logical CPUs",
            f"the run's actors take {need.cpus:g}, its cluster has {need.local_cpus}",
            f"set ray.num_cpus to {need.cpus:g} or more (there may be fewer real ones), or start fewer actors",
        )
    elif need.local_cpus:
        yield ok("logical CPUs", f"{need.local_cpus}; the run's actors take {need.cpus:g}")
