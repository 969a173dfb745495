"""How many calls a model gets: at once, per minute, and none while it asks for patience."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from sif_ray.clock import now_s


class Limits:
    """At most `max_concurrency` calls at once, started evenly spaced. For one event loop.

    Example: `async with limits.slot(): ...`
    """

    def __init__(self, max_concurrency: int, requests_per_minute: float) -> None:
        """`requests_per_minute` = 0: no limit. A minute's calls are spread over the minute, not sent in a burst."""
        self._slots = asyncio.Semaphore(max_concurrency)
        self._spacing_s = 60 / requests_per_minute if requests_per_minute else 0.0
        self._next_s = 0.0  # no call starts earlier

    def pause(self, seconds: float) -> None:
        """Start no call for so long: the server said so (`Retry-After`)."""
        self._next_s = max(self._next_s, now_s() + seconds)

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Wait for the right to make one call, and hold it inside the block."""
        async with self._slots:
            while (wait_s := self._next_s - now_s()) > 0:
                await asyncio.sleep(wait_s)
            self._next_s = now_s() + self._spacing_s
            yield
