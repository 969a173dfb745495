"""Progress with rate and time left: a bar on a terminal, a log line every few seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, TypeVar

log = logging.getLogger(__name__)

Item = TypeVar("Item")
RATE_WINDOW_S = 60.0  # the rate is of the last minute, so that a slow start does not spoil the time left


class Progress:
    """Counts finished units and shows how many, how fast, how long still, and values worth watching.

    `total` None = unknown: no time left is shown. `every_s` is the least time between two log lines when stderr is no
    terminal. `done` units were done before and do not count for the rate.

    Example:
        with Progress("GRPO", total=150, unit="steps") as progress:
            for step in range(150):
                progress.advance(reward=1.8, staleness=1)
    """

    def __init__(
        self,
        title: str,
        total: int | None = None,
        unit: str = "items",
        every_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        done: int = 0,
    ) -> None:
        self.title, self.total, self.unit, self.count = title, total, unit, done
        self._done_before = done
        self._every_s, self._clock = every_s, clock
        self._values: dict[str, Any] = {}
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        self._started_s = self._told_s = self._clock()
        self._marks: deque[tuple[float, int]] = deque([(self._started_s, self.count)])
        if sys.stderr.isatty():
            self._bar = _terminal_bar()
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.count, told="")
            self._bar.start()
        return self

    def advance(self, count: int = 1, **values: float | str) -> None:
        """`count` more units are done; `values` replace those of the same name shown beside the bar."""
        now_s = self._clock()
        self.count += count
        self._values.update(values)
        self._marks.append((now_s, self.count))
        while len(self._marks) > 2 and self._marks[1][0] <= now_s - RATE_WINDOW_S:
            self._marks.popleft()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.count, told=self.tell())
        elif now_s - self._told_s >= self._every_s:
            self._told_s = now_s
            log.info("%s: %s", self.title, self.tell())

    @property
    def rate(self) -> float:
        """Units per second over the last minute; 0.0 before the first."""
        (start_s, start), (end_s, end) = self._marks[0], self._marks[-1]
        return (end - start) / (end_s - start_s) if end_s > start_s else 0.0

    def tell(self) -> str:
        """One line, e.g. `45/150 steps, 1.2 steps/s, 1:28 left, reward 1.80`."""
        of_total = "" if self.total is None else f"/{self.total}"
        parts = [f"{self.count}{of_total} {self.unit}", format_rate(self.rate, self.unit)]
        if self.total is not None and self.rate > 0:
            parts.append(f"{format_seconds(max(0, self.total - self.count) / self.rate)} left")
        parts += [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in self._values.items()
        ]
        return ", ".join(parts)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None:
            took_s = self._clock() - self._started_s
            count = self.count - self._done_before
            rate = format_rate(count / took_s if took_s > 0 else 0.0, self.unit)
            log.info("%s: %d %s in %s, %s", self.title, count, self.unit, format_seconds(took_s), rate)


def track(items: Iterable[Item], title: str, total: int | None = None, unit: str = "items") -> Iterator[Item]:
    """The items, with progress. `total` None = `len(items)` where it has one."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(title, total=total, unit=unit) as progress:
        for item in items:
            yield item
            progress.advance()


def format_seconds(seconds: float) -> str:
    """`0:09`, `12:30` or `1:02:03`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def format_rate(per_s: float, unit: str) -> str:
    """`12.5 rows/s`, or `3.1 s per step` style for what takes longer than a second."""
    if 0 < per_s < 1:
        return f"{1 / per_s:.3g} s per {unit.removesuffix('s')}"
    return f"{per_s:.3g} {unit}/s" if per_s < 1000 else f"{per_s:,.0f} {unit}/s"


def _terminal_bar() -> Any:
    from rich.console import Console
    from rich.logging import RichHandler
    from rich.progress import BarColumn, Progress, TextColumn

    # The console that logging prints to, where there is one: its lines then scroll above the bar.
    handlers = (handler for handler in logging.getLogger().handlers if isinstance(handler, RichHandler))
    console = next((handler.console for handler in handlers), None) or Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), TextColumn("{task.fields[told]}"))
    return Progress(*columns, console=console)
