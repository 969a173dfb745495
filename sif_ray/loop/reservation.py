"""Room on the cluster for every actor of a run, given all at once or not at all."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from sif_ray.config import ConfigError
from sif_ray.resources.placement import ROLE_LABEL, Bundle, Layout, Seat

POLL_S = 1.0


class PlacementError(RuntimeError):
    """The cluster has no room for the run; the message says what is missing."""


class Reservation:
    """Where each actor of a layout belongs. A place outlives its actor: the one that replaces it goes there too."""

    def __init__(self, layout: Layout, groups: list[PlacementGroup]) -> None:
        self._options: dict[str, dict[str, Any]] = {}
        for bundles, group in zip(layout.nodes, groups, strict=True):
            for index, bundle in enumerate(bundles):
                place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
                for seat in bundle.seats:
                    self._options[seat.actor] = _resources(seat) | {"scheduling_strategy": place}

    def options(self, actor: str) -> dict[str, Any]:
        """Arguments for `.options(...)` of the actor named `actor`, e.g. "engine 0".

        One that is not in the layout, because it joined later, takes what its kind takes wherever there is room.
        """
        if actor in self._options:
            return self._options[actor]
        first = self._options[f"{actor.split()[0]} 0"]
        return {name: value for name, value in first.items() if name != "scheduling_strategy"}


@contextlib.contextmanager
def reserved(layout: Layout, *, timeout_s: float, can_grow: bool) -> Iterator[Reservation]:
    """Room for all of `layout` while the block lasts, as one placement group per machine. Where nodes of the cluster
    are labelled with its roles (`ROLE_LABEL`), each group goes to one with its own.

    Raises `ConfigError` at once for more than the cluster has, unless it `can_grow`; `PlacementError` when there is no
    room within `timeout_s`. Actors in the room end with the block.
    """
    if not can_grow:
        _refuse_excess(layout, ray.cluster_resources())
    groups: list[PlacementGroup] = []
    labelled = not set(layout.roles).isdisjoint(_machine_roles())
    try:
        for bundles, role in zip(layout.nodes, layout.roles, strict=True):
            labels = [{ROLE_LABEL: role}] * len(bundles) if labelled else None
            demands = [_demand(bundle) for bundle in bundles]
            groups.append(placement_group(demands, strategy=layout.strategy, bundle_label_selector=labels))
        _wait(layout, groups, timeout_s)
        yield Reservation(layout, groups)
    finally:
        for group in groups:
            remove_placement_group(group)


def _wait(layout: Layout, groups: list[PlacementGroup], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    for ready, group in enumerate(groups):
        while not group.wait(timeout_seconds=POLL_S):  # in short pieces: Ray's wait hears no signal
            if time.monotonic() >= deadline_s:
                raise PlacementError(_no_room(layout, ready, timeout_s))


def _resources(seat: Seat) -> dict[str, Any]:
    return {"num_cpus": seat.num_cpus, "num_gpus": seat.num_gpus}


def _demand(bundle: Bundle) -> dict[str, float]:
    return {name: count for name, count in (("CPU", bundle.num_cpus), ("GPU", bundle.num_gpus)) if count}


def _refuse_excess(layout: Layout, total: Mapping[str, float]) -> None:
    for resource in ("CPU", "GPU"):
        needs: dict[str, float] = {}
        for bundle in layout.bundles:
            for seat in bundle.seats:
                kind = seat.actor.split()[0]
                needs[kind] = needs.get(kind, 0.0) + _demand(Bundle((seat,))).get(resource, 0.0)
        needed = sum(_demand(bundle).get(resource, 0.0) for bundle in layout.bundles)
        found = total.get(resource, 0.0)
        if needed > found:
            parts = " + ".join(f"{count:g} {kind}" for kind, count in needs.items())
            raise ConfigError(
                f"{needed:g} logical {resource}s ({parts}) exceed the {found:g} of the cluster; start fewer actors or "
                "raise ray.num_cpus"
            )


def _no_room(layout: Layout, num_ready: int, timeout_s: float) -> str:
    wanted = [
        {name: sum(_demand(bundle).get(name, 0.0) for bundle in bundles) for name in ("CPU", "GPU")}
        for bundles in layout.nodes
    ]
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return (
        f"the cluster had room for {num_ready} of the run's {len(layout.nodes)} machines within placement.timeout_s = "
        f"{timeout_s:g}. Wanted, by machine: {_counts(*wanted)}. Machines have: {_counts(*machines)}. Free now: "
        f"{_counts(ray.available_resources())}. {_labels(layout)}Add machines, start fewer actors or wait longer"
    )


def _labels(layout: Layout) -> str:
    found = _machine_roles()
    return f"Wanted labels {ROLE_LABEL}: {', '.join(layout.roles)}; found: {', '.join(found)}. " if found else ""


def _machine_roles() -> list[str]:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return [node["Labels"][ROLE_LABEL] for node in nodes if ROLE_LABEL in node.get("Labels", {})]


def _counts(*resources: Mapping[str, float]) -> str:
    return "; ".join(f"{has.get('CPU', 0.0):g} CPU + {has.get('GPU', 0.0):g} GPU" for has in resources)
