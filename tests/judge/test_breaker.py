"""The breaker: closed, open, half-open."""

from __future__ import annotations

import asyncio
import time

from sif_ray.judge.breaker import Breaker

COOLDOWN_S = 0.1


def opened() -> Breaker:
    breaker = Breaker("judge", 3, COOLDOWN_S)
    for _ in range(3):
        breaker.enter().ended(alive=False)
    return breaker


async def test_only_failures_in_a_row_open_it():
    breaker = Breaker("judge", 3, COOLDOWN_S)
    for alive in (False, False, True, False, None, False):
        breaker.enter().ended(alive=alive)
    assert breaker.times_opened == 0
    breaker.enter().ended(alive=False)
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
    probe = breaker.enter()
    assert not breaker.enter()
    probe.ended(alive=False)
    assert not breaker.enter()
    assert await breaker.wait(10)
    breaker.enter().ended(alive=True)
    assert breaker.enter() and breaker.enter()
    assert breaker.times_opened == 1


async def test_a_probe_that_is_not_heard_out_leaves_room_for_another():
    breaker = opened()
    assert await breaker.wait(10)
    breaker.enter().ended(alive=None)
    assert breaker.enter()


async def test_an_attempt_from_before_the_outage_does_not_end_the_turn_of_the_one_that_probes():
    breaker = Breaker("judge", 1, COOLDOWN_S)
    slow, failed = breaker.enter(), breaker.enter()
    failed.ended(alive=False)
    assert await breaker.wait(10)
    probe = breaker.enter()
    slow.ended(alive=False)  # opens it again, for another cooldown
    await asyncio.sleep(COOLDOWN_S * 1.5)
    assert not breaker.enter()
    probe.ended(alive=True)
    assert breaker.enter() and breaker.enter()


async def test_who_waits_is_woken_by_the_probe():
    breaker = opened()
    assert await breaker.wait(10)
    probe = breaker.enter()
    waiting = [asyncio.create_task(breaker.wait(10)) for _ in range(5)]
    gives_up = asyncio.create_task(breaker.wait(0.05))
    await asyncio.sleep(0.1)
    assert not any(task.done() for task in waiting)
    assert gives_up.result() is False
    probe.ended(alive=True)
    assert await asyncio.wait_for(asyncio.gather(*waiting), 1) == [True] * 5
