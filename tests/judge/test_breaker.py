"""The breaker: closed, open, half-open."""

from __future__ import annotations

import asyncio
import time

from sif_ray.judge.breaker import Breaker

COOLDOWN_S = 0.1


def opened() -> Breaker:
    breaker = Breaker("judge", 3, COOLDOWN_S)
    for _ in range(3):
        assert breaker.enter()
        breaker.leave(alive=False)
    return breaker


async def test_only_failures_in_a_row_open_it():
    breaker = Breaker("judge", 3, COOLDOWN_S)
    for alive in (False, False, True, False, None, False):
        assert breaker.enter()
        breaker.leave(alive)
    assert breaker.times_opened == 0
    assert breaker.enter()
    breaker.leave(alive=False)
    assert breaker.times_opened == 1
    assert not breaker.enter()


async def test_open_it_fails_fast():
    breaker = opened()
    started_s = time.monotonic()
    assert not await breaker.wait(0)
    assert not await breaker.wait(-5)
    assert time.monotonic() - started_s < COOLDOWN_S / 2


async def test_one_probe_decides():
    breaker = opened()
    assert await breaker.wait(10)
    assert breaker.enter()
    assert not breaker.enter()
    breaker.leave(alive=False)
    assert not breaker.enter()
    assert await breaker.wait(10)
    assert breaker.enter()
    breaker.leave(alive=True)
    assert breaker.enter() and breaker.enter()
    assert breaker.times_opened == 1


async def test_a_probe_that_is_not_heard_out_leaves_room_for_another():
    breaker = opened()
    assert await breaker.wait(10)
    assert breaker.enter()
    breaker.leave(alive=None)
    assert breaker.enter()


async def test_who_waits_is_woken_by_the_probe():
    breaker = opened()
    assert await breaker.wait(10)
    assert breaker.enter()
    waiting = [asyncio.create_task(breaker.wait(10)) for _ in range(5)]
    gives_up = asyncio.create_task(breaker.wait(0.05))
    await asyncio.sleep(0.1)
    assert not any(task.done() for task in waiting)
    assert gives_up.result() is False
    breaker.leave(alive=True)
    assert await asyncio.wait_for(asyncio.gather(*waiting), 1) == [True] * 5
