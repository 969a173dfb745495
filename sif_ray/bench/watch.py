"""Something that is looked at again and again while work is done."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Watch(ABC):
    """Takes a sample when the body starts, every `every_s` seconds in a thread, and when it ends.

    An error of the thread is raised when the body ends, unless that has failed itself.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._ended = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._watch, name=type(self).__name__, daemon=True)

    def __enter__(self) -> Self:
        self.sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if kind is None:
            self.check_runs()
            self.sample()

    def check_runs(self) -> None:
        """Raises what has ended its thread."""
        if self._error is not None:
            raise self._error

    @abstractmethod
    def sample(self) -> None:
        """Look, and keep what is seen."""

    def _watch(self) -> None:
        try:
            while not self._ended.wait(self._every_s):
                self.sample()
        except Exception as error:  # noqa: BLE001  # of any kind: it belongs to who waits
            self._error = error
