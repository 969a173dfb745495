"""What a check says: that something is in order, worth knowing, or wrong, and then what to do about it."""

from __future__ import annotations

from dataclasses import dataclass

OK, NOTE, FAULT = "ok", "note", "fault"


@dataclass(frozen=True)
class Finding:
    """Example: `fault("disk: output", "2.1 GB free", "make room")`."""

    check: str  # what was looked at, e.g. "judge: endpoint"
    level: str  # OK, NOTE (the run can work) or FAULT (it cannot, or not well)
    found: str
    fix: str = ""  # of a note or a fault
    node: str = ""  # of a cluster; "" = the process that was started


def ok(check: str, found: str) -> Finding:
    return Finding(check, OK, found)


def note(check: str, found: str, fix: str) -> Finding:
    return Finding(check, NOTE, found, fix)


def fault(check: str, found: str, fix: str) -> Finding:
    return Finding(check, FAULT, found, fix)


def of_refusal(check: str, error: Exception) -> Finding:
    """The fault in a `ConfigError`, whose last clause is the way out."""
    found, _, fix = str(error).rpartition("; ")
    return fault(check, found or fix, fix if found else "correct the setting that is named")
