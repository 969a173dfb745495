"""Side work that may be slow or fail without harm to a run: a thread with a queue, and a count of what it lost."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class Background:
    """Runs calls one after another in a thread of its own; nobody waits for them.

    A call that raises, or finds `max_waiting` others before it, is lost: counted in `num_lost`, the first one logged,
    the number logged at the end.

    Example: `Background("tracker wandb", max_waiting=1000).submit(run.log, {"loss": 0.3})`.
    """

    def __init__(self, name: str, max_waiting: int) -> None:
        self._name, self._max_waiting = name, max_waiting
        self._calls: queue.SimpleQueue[tuple[Callable[..., object], tuple[object, ...]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._num_lost = 0
        # A daemon, as a call that never returns must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def num_lost(self) -> int:
        """Calls that failed or were not taken, so far."""
        return self._num_lost

    def submit(self, call: Callable[..., object], *arguments: object) -> None:
        """Run `call(*arguments)` later. Returns at once."""
        if self._calls.qsize() < self._max_waiting:
            self._calls.put((call, arguments))
        elif self._lose():
            log.warning("%s is %d calls behind; the run goes on without it", self._name, self._max_waiting)

    def close(self, timeout_s: float = 30.0) -> None:
        """Finish what waits, for `timeout_s` at most, and end the thread."""
        self._calls.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.warning("%s has not finished within %g s and is given up", self._name, timeout_s)
        if self._num_lost:
            log.warning("%s lost %d calls", self._name, self._num_lost)

    def _work(self) -> None:
        while (entry := self._calls.get()) is not None:
            call, arguments = entry
            try:
                call(*arguments)
            except Exception:  # whatever a client raises: counted and told, and the run goes on
                if self._lose():
                    log.warning("%s failed; the run goes on without it", self._name, exc_info=True)

    def _lose(self) -> bool:
        """Count a loss; whether it is the first."""
        with self._lock:
            self._num_lost += 1
            return self._num_lost == 1
