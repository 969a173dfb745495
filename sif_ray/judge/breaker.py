"""A circuit breaker: a model that is down is not asked by everybody over and over.

    closed ──`failures` failed attempts in a row──► open ──`cooldown_s`──► half-open: one attempt
      ▲                                              ▲                        │
      └────────────── it succeeds ───────────────────┼────────────────────────┤
                                                     └──────── it fails ──────┘

A failed attempt is one that speaks against the model itself: no connection, no reply in time, an error of the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math

from sif_ray.clock import now_s

log = logging.getLogger(__name__)


class Attempt:
    """An attempt that the breaker has let in. It is told once how that ended."""

    def __init__(self, breaker: Breaker, probes: bool) -> None:
        self._breaker, self._probes = breaker, probes

    def ended(self, alive: bool | None) -> None:
        """The model answered, did not, or (None) was not heard out."""
        self._breaker._attempt_ended(alive, self._probes)


class Breaker:
    """Counts failed attempts and holds calls back. For one event loop.

    Example: `if (attempt := breaker.enter()) is not None: ...; attempt.ended(alive=True)`.
    """

    def __init__(self, name: str, failures: int, cooldown_s: float) -> None:
        """`name`, e.g. "judge", is what log lines call the model."""
        self._name = name
        self._failures = failures
        self._cooldown_s = cooldown_s
        self._in_a_row = 0
        self._open_until_s: float | None = None  # None = closed
        self._probing = False
        self._changed = asyncio.Event()
        self.times_opened = 0

    @property
    def is_open(self) -> bool:
        """The model is taken for down; half-open included."""
        return self._open_until_s is not None

    def enter(self) -> Attempt | None:
        """An attempt that may be made now. None: the breaker is open, or another attempt probes already."""
        if self._wait_s() > 0:
            return None
        self._probing |= self.is_open
        return Attempt(self, probes=self.is_open)

    def _attempt_ended(self, alive: bool | None, probed: bool) -> None:
        if alive:
            if self.is_open:
                log.warning("the %s answers again", self._name)
            self._in_a_row, self._open_until_s = 0, None
        elif alive is not None:
            self._in_a_row += 1
            if self._in_a_row >= self._failures:
                self._open()
        self._probing &= not probed  # attempts from before the outage may end while one probes
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait(self, max_wait_s: float) -> bool:
        """Wait until `enter` may work; False when that takes longer than `max_wait_s`."""
        end_s = now_s() + max_wait_s
        while (wait_s := self._wait_s()) > 0:
            left_s = end_s - now_s()
            if left_s <= 0:
                return False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(wait_s, left_s)):
                    await self._changed.wait()
        return True

    def _open(self) -> None:
        if not self.is_open:
            self.times_opened += 1
            log.warning(
                "the %s failed %d times in a row; next attempt in %g s", self._name, self._in_a_row, self._cooldown_s
            )
        self._open_until_s = now_s() + self._cooldown_s

    def _wait_s(self) -> float:
        """Seconds until an attempt may be made; 0 = now."""
        if self._open_until_s is None:
            return 0.0
        return math.inf if self._probing else max(0.0, self._open_until_s - now_s())
