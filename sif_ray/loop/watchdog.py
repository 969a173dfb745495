"""Who has work under way, since when, and who has stopped answering.

A party (an engine, a scorer, the learner) is *stuck* when it has calls under way and has finished none of them for
`stuck_after_s`. A party that answers some calls is slow, not stuck: single lost requests are the ledger's affair. Who
only waits for others is never stuck, but is in the report, so that it shows who waits for whom.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from sif_ray.clock import now_s


@dataclass
class _Party:
    answered_s: float  # of the last call that ended
    calls: dict[int, tuple[str, float]] = field(default_factory=dict)  # by number: what, since


class Watchdog:
    """Keeps the calls under way and finds the party that is stuck. Reads time only through `now_s`.

    Example:
        >>> clock = iter([0.0, 601.0, 602.0])
        >>> dog = Watchdog(600.0, now_s=lambda: next(clock))
        >>> with dog.call("engine 0", "generate 0/p3"):
        ...     dog.stuck()
        {'engine 0': 'has answered nothing for 601 s; 1 call under way, the oldest for 601 s: generate 0/p3'}
    """

    def __init__(self, stuck_after_s: float, now_s: Callable[[], float] = now_s) -> None:
        """`stuck_after_s` 0 = nobody is ever stuck."""
        self._stuck_after_s = stuck_after_s
        self._now_s = now_s
        self._parties: dict[str, _Party] = {}
        self._waits: dict[int, tuple[str, str, float]] = {}  # by number: who, for what, since
        self._count = 0

    @contextlib.contextmanager
    def call(self, party: str, what: str) -> Iterator[None]:
        """`party` is asked for `what` inside the body."""
        now_s = self._now_s()
        entry = self._parties.setdefault(party, _Party(now_s))
        self._count += 1
        number = self._count
        entry.calls[number] = (what, now_s)
        try:
            yield
        finally:
            del entry.calls[number]
            entry.answered_s = self._now_s()

    @contextlib.contextmanager
    def waiting(self, who: str, what: str) -> Iterator[None]:
        """`who` waits for `what` inside the body."""
        self._count += 1
        number = self._count
        self._waits[number] = (who, what, self._now_s())
        try:
            yield
        finally:
            del self._waits[number]

    def forget(self, party: str) -> None:
        """A new worker takes the party's name: the calls of the old one no longer count."""
        self._parties.pop(party, None)

    def stuck(self) -> dict[str, str]:
        """{party: what it does not answer} of every party that is stuck."""
        if not self._stuck_after_s:
            return {}
        now_s = self._now_s()
        return {
            name: f"has answered nothing for {silent_s:.0f} s; {_tell(party, now_s)}"
            for name, party in self._parties.items()
            if (silent_s := _silent_s(party, now_s)) >= self._stuck_after_s
        }

    def report(self) -> str:
        """One line for every party that has work under way and for everyone who waits."""
        now_s = self._now_s()
        busy = [f"{name}: {_tell(party, now_s)}" for name, party in self._parties.items() if party.calls]
        waits = [f"{who}: waits for {what}, for {now_s - since:.0f} s" for who, what, since in self._waits.values()]
        return "\n".join([*busy, *waits])


def _silent_s(party: _Party, now_s: float) -> float:
    """Seconds in which a party with work has answered nothing; 0 without work."""
    if not party.calls:
        return 0.0
    return now_s - max(party.answered_s, min(since for _, since in party.calls.values()))


def _tell(party: _Party, now_s: float) -> str:
    what, since = min(party.calls.values(), key=lambda call: call[1])
    count = len(party.calls)
    return f"{count} call{'s' * (count > 1)} under way, the oldest for {now_s - since:.0f} s: {what}"


@contextlib.contextmanager
def noting(what: str) -> Iterator[None]:
    """Add what was under way to an error of the body."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in the GRPO loop, while {what}")
        raise
