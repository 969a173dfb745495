"""Side work never stops its owner, and what is lost is counted."""

from __future__ import annotations

import logging
import threading
import time

from sif_ray.observe.background import Background


def test_calls_run_in_order_and_are_finished_at_the_end():
    done: list[int] = []
    background = Background("side", max_waiting=100)
    for number in range(50):
        background.submit(done.append, number)
    background.close()
    assert done == list(range(50)) and background.num_lost == 0


def test_a_failing_call_is_counted_told_once_and_the_next_one_runs(caplog):
    done: list[int] = []
    background = Background("side", max_waiting=100)
    for _ in range(3):
        background.submit(int, "no number")
    background.submit(done.append, 1)
    background.close()
    assert done == [1] and background.num_lost == 3
    told = [record.getMessage() for record in caplog.records]
    assert told == ["side failed; the run goes on without it", "side lost 3 calls"]
    assert "invalid literal" in caplog.text


def test_a_call_that_hangs_costs_its_owner_nothing(caplog):
    release = threading.Event()
    background = Background("side", max_waiting=2)
    with caplog.at_level(logging.WARNING):
        started_s = time.monotonic()
        for _ in range(10):
            background.submit(release.wait)
        background.close(timeout_s=0.1)
        assert time.monotonic() - started_s < 5
    assert background.num_lost >= 7  # one hangs, two wait
    assert "is 2 calls behind" in caplog.text and "has not finished within 0.1 s" in caplog.text
    release.set()
