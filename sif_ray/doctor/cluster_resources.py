"""What the nodes of a cluster have, against what a run takes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sif_ray.doctor.finding import Finding, fault, note, ok
from sif_ray.doctor.gpus import count_findings
from sif_ray.doctor.need import MIB, Need

GROWS = "add machines, or ask for less; where the cluster grows by itself this is a matter of waiting"


@dataclass(frozen=True)
class NodeResources:
    """Logical resources of a node, as Ray counts them."""

    cpus: float
    gpus: float
    store_bytes: float

    @classmethod
    def of(cls, resources: Mapping[str, float]) -> NodeResources:
        found = (resources.get(name, 0.0) for name in ("CPU", "GPU", "object_store_memory"))
        return cls(*found)


def resource_findings(nodes: Sequence[NodeResources], available: Mapping[str, float], need: Need) -> Iterator[Finding]:
    """`available`: what no other job holds now."""
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    yield ok("cluster", f"{len(nodes)} nodes with {cpus:g} logical CPUs and {gpus:g} GPUs")
    yield from count_findings(int(gpus), need.gpus, "the cluster")
    yield from _machines_with_gpus(nodes, need)
    if need.cpus > cpus:
        yield fault("logical CPUs", f"the run's actors take {need.cpus:g}, the cluster has {cpus:g}", GROWS)
    yield from _held_by_others(available, {"CPU": (need.cpus, cpus), "GPU": (need.gpus.count, gpus)})
    yield from _object_stores([node for node in nodes if node.cpus or node.gpus], need)


def _machines_with_gpus(nodes: Sequence[NodeResources], need: Need) -> Iterator[Finding]:
    wanted = need.gpus
    large = sum(node.gpus >= wanted.per_node for node in nodes)
    if wanted.per_node and large < wanted.nodes:
        yield fault(
            "GPUs: machines",
            f"placement wants {wanted.nodes} machines with {wanted.per_node} GPUs, the cluster has {large}",
            f"set placement.nodes and placement.gpus_per_node to its machines; or {GROWS}",
        )


def _held_by_others(available: Mapping[str, float], wanted: Mapping[str, tuple[float, float]]) -> Iterator[Finding]:
    for name, (needed, total) in wanted.items():
        free = available.get(name, 0.0)
        if free < needed <= total:
            yield note(
                "cluster",
                f"{free:g} of {total:g} logical {name}s are free now, the run takes {needed:g}",
                "see who holds them (ray status); the run waits placement.timeout_s for room",
            )


def _object_stores(nodes: Sequence[NodeResources], need: Need) -> Iterator[Finding]:
    smallest = min((node.store_bytes for node in nodes), default=0.0)
    told = f"the smallest of a node has {smallest / MIB:.0f} MiB"
    if need.store_bytes > smallest:
        yield fault(
            "object store",
            f"{told}, weight updates and groups of the run take up to {need.store_bytes / MIB:.0f} MiB: Ray would "
            "write them to a disk",
            "start nodes with a larger one (ray start --object-store-memory, and /dev/shm as large), or lower "
            "max_staleness, groups_per_step or sampling.max_tokens",
        )
    elif nodes:
        yield ok("object store", told)
