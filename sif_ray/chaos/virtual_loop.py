"""An asyncio event loop whose clock, and whose order of events, are those of a seed.

Time passes only when nothing can run: the clock then jumps to the next timer, so hours take milliseconds. Of the
callbacks that may run at a moment, one is drawn; after each of them somebody may look at the world, or end it.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar

T = TypeVar("T")


class Crash(KeyboardInterrupt):
    """The process is gone at once. No handler of errors may see it, which is what KeyboardInterrupt is for."""


class Deadlock(AssertionError):
    """Nothing can run, and no timer is set: whoever is waited for will never answer."""


class _Task(asyncio.Task[T]):
    """A task whose place in a set does not depend on its address."""

    def __init__(self, coroutine: Coroutine[Any, Any, T], *, number: int, **options: Any) -> None:
        self._number = number  # before the loop hashes it
        super().__init__(coroutine, **options)

    def __hash__(self) -> int:
        return self._number


class _Future(asyncio.Future[T]):
    """As `_Task`."""

    def __init__(self, *, number: int, **options: Any) -> None:
        self._number = number
        super().__init__(**options)

    def __hash__(self) -> int:
        return self._number


class VirtualLoop(asyncio.AbstractEventLoop):
    """Runs one coroutine on virtual time. What is put to a thread runs within one event, after a pause."""

    def __init__(self, rng: random.Random, *, shuffle: bool, thread_s: float, after_event: Callable[[], None]) -> None:
        """`shuffle`: draw the next callback; else first come, first served. `after_event` may raise what ends all."""
        self._rng, self._shuffle, self._thread_s, self._after_event = rng, shuffle, thread_s, after_event
        self._clock_s = 0.0
        self._ready: list[asyncio.Handle] = []
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count()
        self._running = False
        self._stopping = False
        self._lost: BaseException | None = None  # of a callback: nobody would hear of it
        self.tasks: set[asyncio.Task[Any]] = set()  # not done

    # --- time and order ----------------------------------------------------------------------------------------------

    def time(self) -> float:
        return self._clock_s

    def jump(self, seconds: float) -> None:
        """The machine was asleep: the clock is later, and nothing has happened meanwhile."""
        self._clock_s += seconds

    def _run_one(self) -> None:
        while self._timers and (self._timers[0][0] <= self._clock_s or not self._ready):
            when_s, _, timer = heapq.heappop(self._timers)
            if not timer.cancelled():
                self._clock_s = max(self._clock_s, when_s)
                self._ready.append(timer)
        if not self._ready:
            raise Deadlock(f"after {self._clock_s:.1f} s: " + "; ".join(sorted(task.get_name() for task in self.tasks)))
        handle = self._ready.pop(self._rng.randrange(len(self._ready)) if self._shuffle else 0)
        if not handle.cancelled():
            handle._run()
            if self._lost is not None:
                raise self._lost
            self._after_event()

    def run_forever(self) -> None:
        asyncio._set_running_loop(self)
        self._running, self._stopping = True, False
        try:
            while not self._stopping:
                self._run_one()
        finally:
            self._running = False
            asyncio._set_running_loop(None)

    def run_until_complete(self, future: Any) -> Any:
        """The result of a coroutine or future, or what `after_event` or a `Crash` raises."""
        main = asyncio.ensure_future(future, loop=self)
        main.add_done_callback(lambda _: self.stop())
        self.run_forever()
        return main.result()

    # --- what asyncio asks of a loop ---------------------------------------------------------------------------------

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> asyncio.Handle:  # type: ignore[override]
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]  # there are no threads

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._clock_s + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._numbers), timer))
        return timer

    def create_future(self) -> asyncio.Future[Any]:
        return _Future(loop=self, number=next(self._numbers))

    def create_task(self, coro: Any, *, name: str | None = None, context: Context | None = None) -> asyncio.Task[Any]:  # type: ignore[override]
        number = next(self._numbers)
        task: asyncio.Task[Any] = _Task(coro, loop=self, name=name or f"task {number}", context=context, number=number)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        done = self.create_future()

        def work() -> None:
            if done.cancelled():
                return
            try:
                done.set_result(func(*args))
            except Exception as error:  # noqa: BLE001  # whoever waits for it gets it
                done.set_exception(error)

        self.call_later(self._rng.random() * self._thread_s, work)
        return done

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if "never retrieved" not in context["message"] and "was destroyed" not in context["message"]:
            self._lost = error or RuntimeError(context["message"])

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return self._running

    def is_closed(self) -> bool:
        return False

    def stop(self) -> None:
        self._stopping = True

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Its place in the heap is given up when its time comes."""
