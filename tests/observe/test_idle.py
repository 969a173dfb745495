"""Idle shares against counting small ticks of time."""

from __future__ import annotations

import itertools
import random

import pytest

from sif_ray.observe.idle import IdleClock


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize("seed", range(20))
def test_the_share_counts_ticks_without_anything_under_way(seed):
    rng = random.Random(seed)
    begins = [rng.randrange(300) for _ in range(rng.randrange(1, 12))]
    spans = [(begin, begin + rng.randrange(1, 60)) for begin in begins]
    taken = sorted({0, *(rng.randrange(1, 400) for _ in range(3)), 400})

    clock = Clock()
    idle = IdleClock(clock)
    events = [(begin, 1, idle.__enter__) for begin, _ in spans]
    events += [(end, 0, lambda: idle.__exit__(None, None, None)) for _, end in spans]
    shares: list[float] = []
    events += [(at, 2, lambda: shares.append(idle.take_share())) for at in taken[1:]]
    for at, _, act in sorted(events, key=lambda event: event[:2]):
        clock.now_s = at
        act()

    busy = {tick for begin, end in spans for tick in range(begin, end)}
    expected = [1 - len(busy & set(range(a, b))) / (b - a) for a, b in itertools.pairwise(taken)]
    assert shares == pytest.approx(expected)


def test_no_time_is_not_idle():
    clock = Clock()
    assert IdleClock(clock).take_share() == 0.0


def test_what_fails_is_over():
    clock = Clock()
    idle = IdleClock(clock)
    with pytest.raises(ValueError), idle:
        clock.now_s = 1.0
        raise ValueError
    clock.now_s = 4.0
    assert idle.take_share() == 0.75
