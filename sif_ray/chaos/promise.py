"""What it means to break a promise."""

from __future__ import annotations

from sif_ray.chaos.virtual_loop import Crash


class Violation(Crash):
    """A promise was broken. It ends what is tried there and then, past every handler of errors."""


def promise(kept: bool, what: str) -> None:
    """Raise `Violation` unless it is kept."""
    if not kept:
        raise Violation(what)
