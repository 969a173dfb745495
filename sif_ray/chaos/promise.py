"""What it means to break a promise."""

from __future__ import annotations


class Violation(AssertionError):
    """A promise was broken."""


def promise(kept: bool, what: str) -> None:
    """Raise `Violation` unless it is kept."""
    if not kept:
        raise Violation(what)
