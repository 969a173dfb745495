"""What was measured between two nodes, and what it says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from sif_ray.doctor.finding import Finding, fault, note, ok

ALL_PAIRS_UP_TO = 4  # nodes; of more each is measured with the next one, in a ring
SLOW_MB_S = 110.0  # about a gigabit a second
LONG_S = 0.010


@dataclass(frozen=True)
class Link:
    """From one node to another. 0 = not measured, `closed_ports` or `error` says why."""

    source: str
    target: str
    closed_ports: Mapping[str, str] = field(default_factory=dict)  # by what listens there: why it cannot be reached
    round_trip_s: float = 0.0  # of a call between Ray actors
    mb_per_s: float = 0.0  # of an object between their object stores
    error: str = ""


def pairs_of(nodes: Sequence[str]) -> list[tuple[str, str]]:
    """Which nodes are measured with which."""
    if len(nodes) <= ALL_PAIRS_UP_TO:
        return list(combinations(nodes, 2))
    return list(zip(nodes, [*nodes[1:], nodes[0]], strict=True))


def link_findings(links: Sequence[Link]) -> Iterator[Finding]:
    good = []
    for link in links:
        between = f"{link.source} to {link.target}"
        for what, why in link.closed_ports.items():
            yield fault(
                "network between nodes",
                f"{between}: {what}: {why}",
                "let nodes reach each other on all ports (security group, NetworkPolicy), or fix Ray's by "
                "--node-manager-port, --object-manager-port, --min-worker-port and --max-worker-port",
            )
        if link.error:
            fix = "see whether nodes state addresses that the others reach (ray start --node-ip-address)"
            yield fault("network between nodes", f"{between}: {link.error}", fix)
        elif not link.closed_ports:
            good.append(link)
    yield from _speeds(good)


def _speeds(links: Sequence[Link]) -> Iterator[Finding]:
    if not links:
        return
    slowest = min(links, key=lambda link: link.mb_per_s)
    longest = max(links, key=lambda link: link.round_trip_s)
    told = (
        f"{len(links)} links: at least {slowest.mb_per_s:.0f} MB/s ({slowest.source} to {slowest.target}), "
        f"a call takes at most {1000 * longest.round_trip_s:.1f} ms ({longest.source} to {longest.target})"
    )
    if slowest.mb_per_s < SLOW_MB_S or longest.round_trip_s > LONG_S:
        fix = "weights and groups travel between nodes: put them on one fast network, in one zone"
        yield note("network between nodes", told, fix)
    else:
        yield ok("network between nodes", told)
