"""How far the clocks of nodes are from the driver's, by halving round trips.

A node states its time between `sent` and `received` of the driver's clock. If both ways took equally long it did so in
the middle; it may be off by half the round trip at most. The shortest of several trips says most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sif_ray.doctor.finding import Finding, fault, note, ok

WRONG_S, ODD_S = 2.0, 0.5
_FIX = "keep the clocks of all machines by NTP (chrony, systemd-timesyncd); pods have the clock of their machine"


@dataclass(frozen=True)
class Trip:
    """Seconds since the epoch: `sent` and `received` by the driver's clock, `remote` by the node's."""

    sent_s: float
    remote_s: float
    received_s: float

    @property
    def length_s(self) -> float:
        return self.received_s - self.sent_s

    @property
    def ahead_s(self) -> float:
        """How far the node's clock is ahead of the driver's; off by half of `length_s` at most."""
        return self.remote_s - (self.sent_s + self.received_s) / 2


def clock_findings(trips: Mapping[str, Sequence[Trip]]) -> Iterator[Finding]:
    """`trips` by node."""
    largest = 0.0
    wrong = False
    for node, made in trips.items():
        best = min(made, key=lambda trip: trip.length_s)
        certain_s = max(0.0, abs(best.ahead_s) - best.length_s / 2)  # the least that it is off
        largest = max(largest, certain_s)
        told = f"{node} is {abs(best.ahead_s):.2f} s {'ahead' if best.ahead_s > 0 else 'behind'}"
        if certain_s > WRONG_S:
            wrong = True
            yield fault("clocks", f"{told}: timelines, certificates and signed requests go wrong", _FIX)
        elif certain_s > ODD_S:
            wrong = True
            yield note("clocks", told, _FIX)
    if trips and not wrong:
        yield ok("clocks", f"{len(trips)} nodes within {max(largest, 0.01):.2f} s of the driver")
