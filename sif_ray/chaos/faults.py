"""What goes wrong in a simulated run: rates drawn from a seed, and the dice for every single event."""

from __future__ import annotations

import errno
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sif_ray.chaos.virtual_loop import Crash


@dataclass(frozen=True)
class Rates:
    """Chances, each of one event of its kind. All 0: nothing goes wrong."""

    lost: float = 0.0  # a message, either way
    doubled: float = 0.0  # a request: the receiver carries it out twice
    late: float = 0.0  # a message that takes a hundred times as long
    engine_dies: float = 0.0  # at a point at which it waits
    scorer_dies: float = 0.0
    learner_dies: float = 0.0
    start_fails: float = 0.0
    wrong_bytes: float = 0.0  # an engine loads other weights than were published
    refused: float = 0.0  # a request that no engine can answer
    judge_fails: float = 0.0  # an attempt, while the judge is up
    judge_down: float = 0.0  # share of the time
    disk_fails: float = 0.0  # a file operation
    driver_dies: float = 0.0  # after an event
    driver_dies_in_io: float = 0.0  # before a file operation
    told_to_stop: float = 0.0  # after an event
    asleep: float = 0.0  # the machine, after an event
    resized: float = 0.0  # an engine is added, or told to go, after an event


_HIGHEST = Rates(
    lost=0.02,
    doubled=0.05,
    late=0.05,
    engine_dies=0.02,
    scorer_dies=0.02,
    learner_dies=0.02,
    start_fails=0.2,
    wrong_bytes=0.1,
    refused=0.02,
    judge_fails=0.2,
    judge_down=0.3,
    disk_fails=0.02,
    driver_dies=0.003,
    driver_dies_in_io=0.02,
    told_to_stop=0.001,
    asleep=0.001,
    resized=0.01,
)
KINDS_AT_ONCE = 5  # more of them hide each other: a run that dies at once shows nothing


def draw_rates(rng: random.Random) -> Rates:
    """A few kinds of faults, each at a rate of its own."""
    kinds = rng.sample([field.name for field in fields(Rates)], rng.randint(0, KINDS_AT_ONCE))
    return replace(Rates(), **{kind: getattr(_HIGHEST, kind) * rng.random() for kind in sorted(kinds)})


class Faults:
    """Throws the dice of one run."""

    def __init__(self, rng: random.Random, rates: Rates) -> None:
        self.rng, self.rates = rng, rates
        after_event = (rates.driver_dies, rates.told_to_stop, rates.asleep, rates.resized)
        self.any_time = any(after_event)
        self.happened: Counter[str] = Counter()
        self._before: Counter[str] = Counter()

    def happens(self, kind: str) -> bool:
        """Whether a fault of this kind, a field of `Rates`, happens now."""
        rate = getattr(self.rates, kind)
        if rate == 0.0 or self.rng.random() >= rate:
            return False
        self.happened[kind] += 1
        return True

    def begin_life(self) -> None:
        """A driver starts; see `of_life`."""
        self._before = self.happened.copy()

    def of_life(self) -> Counter[str]:
        """What has happened since the driver started."""
        return self.happened - self._before

    def calm(self) -> None:
        """Nothing goes wrong from now on."""
        self.rates, self.any_time = Rates(), False


_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_watched: tuple[str, Faults] | None = None  # the folder whose files may fail
_hooked = False


@contextmanager
def unsafe_files(folder: Path, faults: Faults) -> Iterator[None]:
    """File operations of this process in `folder` fail inside the body, or the process dies before them."""
    global _watched, _hooked
    if not _hooked:
        sys.addaudithook(_audit)  # cannot be removed, but costs next to nothing
        _hooked = True
    _watched = (str(folder), faults)
    try:
        yield
    finally:
        _watched = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    global _watched
    if _watched is None or event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
        return
    folder, faults = _watched
    path = str(arguments[0])
    if event in ("os.remove", "os.rmdir") and arguments[1] >= 0:  # in a folder given by its handle
        path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), path)
    if not path.startswith(folder) or (event == "open" and not arguments[2] & _WRITES):
        return
    if faults.happens("driver_dies_in_io"):
        _watched = None  # what is unwound now did not happen
        raise Crash
    if event in ("open", "os.mkdir") and faults.happens("disk_fails"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
