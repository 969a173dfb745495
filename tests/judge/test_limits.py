"""Limits of a judge's calls, by the clock."""

from __future__ import annotations

import asyncio
import itertools
import time

from sif_ray.judge.limits import Limits


async def starts(limits: Limits, num_calls: int, call_s: float) -> tuple[list[float], int]:
    """Start times of calls that all want to start now, and how many ran at once."""
    began_s, running, most = [], 0, 0
    origin_s = time.monotonic()

    async def call() -> None:
        nonlocal running, most
        async with limits.slot():
            began_s.append(time.monotonic() - origin_s)
            running += 1
            most = max(most, running)
            await asyncio.sleep(call_s)
            running -= 1

    await asyncio.gather(*(call() for _ in range(num_calls)))
    return sorted(began_s), most


async def test_no_more_than_so_many_at_once():
    assert (await starts(Limits(3, 0), 10, 0.01))[1] == 3


async def test_calls_per_minute_are_spread():
    began_s, _ = await starts(Limits(20, 1200), 8, 0.01)
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(began_s)]
    assert min(gaps_s) >= 0.0499
    assert began_s[-1] < 3.0


async def test_a_pause_holds_back_everybody():
    limits = Limits(4, 0)
    waiting = asyncio.create_task(starts(limits, 2, 0.3))  # started before the pause: not touched by it
    await asyncio.sleep(0.01)
    limits.pause(0.2)
    limits.pause(0.1)  # a shorter one does not end a longer one
    began_s, most = await starts(limits, 3, 0.0)
    assert min(began_s) >= 0.19
    assert most <= 2
    assert max((await waiting)[0]) < 0.1
