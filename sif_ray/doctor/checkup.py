"""Checks are made at the same time, each with a limit; one that breaks or hangs is a fault, and the others go on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from sif_ray.config import ConfigError
from sif_ray.doctor.finding import Finding, fault, of_refusal
from sif_ray.doctor.redaction import hide

LIMIT_S = 25.0


@dataclass(frozen=True)
class Check:
    """One look at one thing. `find` may raise: `ConfigError` for a fault, anything else for a check that broke."""

    name: str
    find: Callable[[], Iterable[Finding]]
    limit_s: float = LIMIT_S


def examine(checks: Sequence[Check], secrets: Collection[str] = ()) -> list[Finding]:
    """The findings of all checks, in their order, without `secrets`."""
    works = [(check, _Work(check)) for check in checks]
    started_s = time.monotonic()
    return [
        replace(finding, found=hide(finding.found, secrets), fix=hide(finding.fix, secrets))
        for check, work in works
        for finding in work.result(started_s + check.limit_s)
    ]


class _Work:
    """A check in a thread of its own. One that hangs is left behind: it must not hold up the end of the process."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self._found: list[Finding] = []
        self._thread = threading.Thread(target=self._run, name=check.name, daemon=True)
        self._thread.start()

    def result(self, until_s: float) -> list[Finding]:
        self._thread.join(max(0.0, until_s - time.monotonic()))
        if self._thread.is_alive():
            hung = fault(
                self._check.name,
                f"no answer within {self._check.limit_s:g} s",
                "see what it waits for: a network drive, an object store or a host that drops packets",
            )
            return [*self._found, hung]
        return self._found

    def _run(self) -> None:
        for finding in _found(self._check):
            self._found.append(finding)  # one by one: what a check found before it hangs is kept


def _found(check: Check) -> Iterator[Finding]:
    try:
        yield from check.find()
    except ConfigError as error:
        yield of_refusal(check.name, error)
    except Exception as error:  # noqa: BLE001 - a check that breaks must not take the others with it
        broke = f"the check itself broke: {type(error).__name__}: {error}"
        yield fault(check.name, broke, "look at this by hand, and report it: the other checks went on")
