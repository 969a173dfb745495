"""The time that everything in an event loop goes by."""

from __future__ import annotations

import asyncio


def now_s() -> float:
    """Seconds on the clock of the running event loop, which its timers go by too; only differences mean anything.

    On a real loop this is `time.monotonic()`. Whoever brings a loop of his own (`sif_ray.chaos.virtual_loop`) decides
    how time passes. Raises `RuntimeError` outside an event loop.
    """
    return asyncio.get_running_loop().time()
