"""A cluster seen from inside, in a process of its own: `python -m sif_ray.doctor.cluster_process`.

Takes a pickled (address, need) on stdin and writes the pickled findings on stdout. What Ray's native parts do when an
address or a token is wrong, abort or wait, ends with this process.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sif_ray.doctor.clocks import Trip, clock_findings
from sif_ray.doctor.cluster_resources import NodeResources, resource_findings
from sif_ray.doctor.finding import Finding, fault, ok
from sif_ray.doctor.links import Link, link_findings, pairs_of
from sif_ray.doctor.machine import existing
from sif_ray.doctor.need import Need
from sif_ray.doctor.node import NodeReport, examine_node
from sif_ray.doctor.probe import Probe
from sif_ray.doctor.versions import difference_findings

NODE_LIMIT_S = 120.0  # for all nodes to be looked at, which they are at the same time
START_LIMIT_S = 60.0  # for the probes of all nodes to be up
LINK_LIMIT_S = 20.0
TRIPS = 5
PAYLOAD_BYTES = 32 * 2**20
HEAD = "node:__internal_head__"


@dataclass(frozen=True)
class Node:
    """A machine of the cluster."""

    name: str  # for people
    node_id: str
    host: str
    ports: Mapping[str, int]
    resources: Mapping[str, float]

    @property
    def here(self) -> dict[str, Any]:
        """Options of an actor or task that is to run there, and takes nothing of what others wait for."""
        return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(self.node_id, soft=False)}


def look(address: str, need: Need) -> list[Finding]:
    """All that is found from inside a cluster. Raises what `ray.init` raises."""
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    nodes = nodes_of(ray.nodes())
    own = [NodeResources.of(node.resources) for node in nodes]
    found = list(resource_findings(own, ray.available_resources(), need))
    with _markers(need) as paths:
        reports, lost = _reports(nodes, need, tuple(paths))
    found += lost
    found += [replace(finding, node=name) for name, report in reports.items() for finding in report.findings]
    found += difference_findings({name: report.versions for name, report in reports.items()})
    found += _path_findings(paths, reports)
    found += _between([node for node in nodes if node.name in reports])
    return found


def nodes_of(states: Sequence[Mapping[str, Any]]) -> list[Node]:
    """The live ones of `ray.nodes()`, the head first."""
    alive = sorted((state for state in states if state["Alive"]), key=lambda state: HEAD not in state["Resources"])
    hosts = [state["NodeManagerAddress"] for state in alive]
    found = []
    for state in alive:
        host = state["NodeManagerAddress"]
        name = host if hosts.count(host) == 1 else f"{host}/{state['NodeID'][:6]}"
        ports = {"node manager": state["NodeManagerPort"], "object manager": state["ObjectManagerPort"]}
        head = " (head)" if HEAD in state["Resources"] else ""
        found.append(Node(name + head, state["NodeID"], host, ports, state["Resources"]))
    return found


# --- every node by itself --------------------------------------------------------------------------------------------


def _reports(nodes: Sequence[Node], need: Need, paths: tuple[str, ...]) -> tuple[dict[str, NodeReport], list[Finding]]:
    """What each node says of itself, and a fault for each that says nothing."""
    task = ray.remote(max_retries=0)(examine_node)
    calls = {task.options(**node.here).remote(need, paths): node.name for node in nodes}
    done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=NODE_LIMIT_S)
    reports, lost = {}, []
    for call, name in calls.items():
        try:
            if call not in done:
                raise GetTimeoutError(f"no answer within {NODE_LIMIT_S:g} s")
            reports[name] = ray.get(call)
        except RayError as error:
            why = str(error).strip().splitlines()[-1]
            fix = "see that the node is healthy (ray status), and that sif_ray is installed or shipped (--working-dir)"
            lost.append(replace(fault("node", f"cannot be examined: {why}", fix), node=name))
    return reports, lost


@contextlib.contextmanager
def _markers(need: Need) -> Iterator[dict[str, str]]:
    """What every node must see, by path: files read, and a file put for the body beside each folder that is written."""
    places = [*need.policies, *need.adapters, *need.depth_models, *need.datasets, *need.inputs]
    paths = {str(Path(at.place).absolute()): at.field for at in places if Path(at.place).exists()}
    marks = []
    for output in need.outputs:
        if "://" not in output.place:
            mark = existing(Path(output.place)) / f".probe-{uuid.uuid4().hex}"
            with contextlib.suppress(OSError):  # told by the check of the folder itself
                mark.touch()
                marks.append(mark)
                paths[str(mark)] = output.field
    try:
        yield paths
    finally:
        for mark in marks:
            mark.unlink(missing_ok=True)


def _path_findings(paths: Mapping[str, str], reports: Mapping[str, NodeReport]) -> Iterator[Finding]:
    for path, field in paths.items():
        folder = str(Path(path).parent) if Path(path).name.startswith(".probe-") else path
        blind = [name for name, report in reports.items() if not report.seen[path]]
        if blind:
            yield fault(
                f"folder: {field} on every node",
                f"{folder} of the driver's machine is not there on {', '.join(blind)}",
                "put it on storage that every node mounts, or into a bucket",
            )
        else:
            yield ok(f"folder: {field} on every node", f"{folder} is seen by {len(reports)} nodes")


# --- between nodes ---------------------------------------------------------------------------------------------------


def _between(nodes: Sequence[Node]) -> list[Finding]:
    probes = {node.name: ray.remote(Probe).options(max_concurrency=4, **node.here).remote() for node in nodes}
    listening = {name: probe.listen.remote() for name, probe in probes.items()}
    done, _ = ray.wait(list(listening.values()), num_returns=len(listening), timeout=START_LIMIT_S)
    up = {name: ray.get(port) for name, port in listening.items() if port in done}
    by_name = {node.name: node for node in nodes}
    links = [_link(by_name[source], by_name[target], probes, up[target]) for source, target in pairs_of(list(up))]
    trips = {name: [_trip(probes[name]) for _ in range(TRIPS)] for name in up}
    return [*clock_findings(trips), *link_findings(links)]


def _trip(probe: Any) -> Trip:
    sent_s = time.time()
    remote_s = ray.get(probe.now_s.remote(), timeout=LINK_LIMIT_S)
    return Trip(sent_s, remote_s, time.time())


def _link(source: Node, target: Node, probes: Mapping[str, Any], free_port: int) -> Link:
    """Ports first: where one is closed, an object could wait for ever."""
    asking, asked = probes[source.name], probes[target.name]
    link = Link(source.name, target.name)
    try:
        ports = {**target.ports, "a port of a process group": free_port}
        closed = ray.get(asking.reach.remote(target.host, ports), timeout=LINK_LIMIT_S)
        if closed:
            return replace(link, closed_ports=closed)
        payload = asked.payload.remote(PAYLOAD_BYTES)
        ray.wait([payload], timeout=LINK_LIMIT_S, fetch_local=False)
        seconds = ray.get(asking.fetch_s.remote([payload]), timeout=LINK_LIMIT_S)
        trip_s = ray.get(asking.round_trip_s.remote(asked), timeout=LINK_LIMIT_S)
    except RayError as error:
        return replace(link, error=f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}")
    return replace(link, round_trip_s=trip_s, mb_per_s=PAYLOAD_BYTES / 1e6 / seconds)


def main() -> None:
    address, need = pickle.load(sys.stdin.buffer)
    with contextlib.redirect_stdout(sys.stderr):
        found = look(address, need)
    pickle.dump(found, sys.stdout.buffer)


if __name__ == "__main__":
    main()
