"""How much of the time nothing was asked of a part of the loop."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from sif_ray.clock import now_s


class IdleClock:
    """Measures the share of time in which nothing is under way; what is under way may overlap.

    Example:
        idle = IdleClock()
        with idle:
            await engine.generate(request)
        idle.take_share()  # since the last call: 0.2 = a fifth of the time without a request
    """

    def __init__(self, clock: Callable[[], float] = now_s) -> None:
        self._clock = clock
        self._num_under_way = 0
        self._idle_s = 0.0  # since `_taken_s`, without the stretch that is not over
        self._taken_s = self._idle_since_s = clock()

    def __enter__(self) -> IdleClock:
        if self._num_under_way == 0:
            self._idle_s += self._clock() - self._idle_since_s
        self._num_under_way += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._num_under_way -= 1
        if self._num_under_way == 0:
            self._idle_since_s = self._clock()

    def take_share(self) -> float:
        """Idle share in [0, 1] of the time since the last call (or the start), and begin again. 0.0 for no time."""
        now_s = self._clock()
        idle_s = self._idle_s + (now_s - self._idle_since_s if self._num_under_way == 0 else 0.0)
        took_s = now_s - self._taken_s
        self._idle_s, self._taken_s, self._idle_since_s = 0.0, now_s, now_s
        return idle_s / took_s if took_s > 0 else 0.0
