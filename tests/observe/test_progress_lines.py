"""Progress tells count, rate, time left and values, and logs no more often than asked."""

from __future__ import annotations

import io
import logging

import pytest

from sif_ray.observe.progress import Progress, format_rate, format_seconds, track


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def test_rate_and_time_left(clock):
    with Progress("GRPO", total=10, unit="steps", clock=clock) as progress:
        for _ in range(4):
            clock.now_s += 2.0
            progress.advance(reward=1.5)
        assert progress.tell() == "4/10 steps, 2 s per step, 0:12 left, reward 1.5"


def test_what_was_done_before_counts_for_the_end_and_not_for_the_rate(clock, caplog):
    caplog.set_level(logging.INFO, logger="sif_ray")
    with Progress("GRPO", total=10, unit="steps", every_s=100.0, clock=clock, done=6) as progress:
        clock.now_s += 2.0
        progress.advance()
        assert progress.tell() == "7/10 steps, 2 s per step, 0:06 left"
    assert caplog.messages == ["GRPO: 1 steps in 0:02, 2 s per step"]


def test_the_rate_is_of_the_last_minute(clock):
    with Progress("rows", total=2000, clock=clock) as progress:
        clock.now_s += 300.0  # a slow start
        progress.advance()
        for _ in range(80):
            clock.now_s += 1.0
            progress.advance(10)
        assert progress.rate == pytest.approx(10.0)


def test_lines_are_spaced(clock, caplog):
    caplog.set_level(logging.INFO, logger="sif_ray")
    with Progress("rows", total=100, every_s=5.0, clock=clock) as progress:
        for _ in range(100):
            clock.now_s += 0.2
            progress.advance()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 5  # after 5, 10, 15 and 20 seconds, and at the end
    assert lines[0].startswith("rows: 25/100") or lines[0].startswith("rows: 26/100")
    assert lines[-1] == "rows: 100 items in 0:20, 5 items/s"


def test_on_a_terminal_a_bar_is_drawn(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with Progress("rows", total=2, clock=clock) as progress:
        clock.now_s += 1.0
        progress.advance(2)
    assert "2/2 items, 2 items/s" in terminal.getvalue()


def test_track_yields_every_item():
    assert list(track([3, 1, 2], "rows")) == [3, 1, 2]
    assert list(track(iter("ab"), "letters")) == ["a", "b"]


@pytest.mark.parametrize(
    ("value", "text"), [(9.4, "0:09"), (750, "12:30"), (3723, "1:02:03"), (59.6, "1:00"), (0, "0:00")]
)
def test_seconds(value, text):
    assert format_seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(12.5, "12.5 rows/s"), (0.25, "4 s per row"), (0.0, "0 rows/s"), (2613.2, "2,613 rows/s")]
)
def test_rates(value, text):
    assert format_rate(value, "rows") == text
