"""A rollout engine on a virtual clock: continuous batching as processor sharing.

Every sequence that an engine writes gets one token per decode step, and how long a step takes follows from their
number. So an engine needs no event per token: counted in decode steps it is known when each sequence ends (its start
plus its tokens), and from one end to the next the clock runs evenly. Whatever happens in between is exact.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ROUNDING = 1e-9  # of a decode step, and of the clock


@dataclass(slots=True)
class Group:
    """The completions of one prompt on their way."""

    key: Any  # whatever the caller wants back
    lengths: Sequence[int]
    version: int = -1  # of its oldest token; -1 before the first one
    last_end: float = 0.0  # decode steps of the engine when the last of its sequences ends, as far as they have started
    unstarted: int = 0  # sequences without a place


class Engine:
    """One engine with `max_num_seqs` places. All times in seconds of the virtual clock, `advance` first of all calls.

    Example:
        engine = Engine(decode_step_s=(0.0, 0.01, 0.012), max_num_seqs=2)
        engine.add(Group("a", [100, 50]), now_s=0.0)
        engine.next_s()  # 50 * 0.012 + 50 * 0.01 = 1.1
        engine.advance(1.1)  # [the group "a"]
    """

    def __init__(self, decode_step_s: Sequence[float], max_num_seqs: int, prefill_s: float = 0.0) -> None:
        self.version = 0
        self.slowdown = 1.0  # factor on every decode step
        self.tokens = 0.0  # written so far
        self.busy_s = 0.0  # with a sequence to write
        self._step_s = decode_step_s
        self._places = max_num_seqs
        self._prefill_s = prefill_s
        self._now_s = 0.0
        self._still_until_s = 0.0  # prefill, pauses
        self._steps = 0.0  # decode steps done
        self._ends: list[float] = []  # of the sequences that are written, in decode steps, ascending
        self._waiting: deque[tuple[Group, int]] = deque()  # sequences without a place, with their lengths
        self._started: list[tuple[float, int, Group]] = []  # heap by end: groups of which every sequence has a place
        self._count = 0

    @property
    def has_waiting(self) -> bool:
        """Whether sequences wait for a place."""
        return bool(self._waiting)

    def add(self, group: Group, now_s: float) -> None:
        """Begin a group; sequences without a place wait for one, first come first served."""
        assert now_s == self._now_s
        group.unstarted = len(group.lengths)
        self.stand_still(self._prefill_s)
        if not self._waiting and len(self._ends) + len(group.lengths) <= self._places:
            self._ends += [self._steps + length for length in group.lengths]
            self._ends.sort()
            self._begin(group, max(group.lengths), len(group.lengths))
            return
        self._waiting.extend((group, length) for length in group.lengths)
        self._fill()

    def stand_still(self, seconds: float) -> None:
        """Write nothing for so long, from now on or after what the engine stands still for already."""
        self._still_until_s = max(self._still_until_s, self._now_s) + seconds

    def next_s(self) -> float:
        """When the next group ends, or a waiting sequence gets a place, if nothing else happens; inf = never."""
        if not self._ends:
            return math.inf
        target = self._ends[0] if self._waiting else self._started[0][0]
        clock_s, steps, running = max(self._now_s, self._still_until_s), self._steps, len(self._ends)
        step_s, slowdown = self._step_s, self.slowdown
        for end in self._ends:
            if end > target:
                break
            clock_s += (end - steps) * step_s[running] * slowdown
            steps = end
            running -= 1
        return clock_s

    def advance(self, to_s: float) -> list[Group]:
        """Write until `to_s`; returns the groups that have ended, in order. `to_s` may be the `next_s` of before."""
        clock_s, ends, steps = self._now_s, self._ends, self._steps
        if not ends:
            self._now_s = to_s
            return []
        self.busy_s += to_s - clock_s
        clock_s = min(max(clock_s, self._still_until_s), to_s)
        limit_s, tokens = to_s + ROUNDING * max(to_s, 1.0), 0.0
        while ends and clock_s < to_s:
            running = len(ends)
            step_s = self._step_s[running] * self.slowdown
            to_end = ends[0] - steps
            if clock_s + to_end * step_s > limit_s:
                to_end = (to_s - clock_s) / step_s
                steps += to_end
                tokens += to_end * running
                break
            clock_s += to_end * step_s
            tokens += to_end * running
            steps = ends[0]
            del ends[: bisect_right(ends, steps + ROUNDING)]
            if self._waiting:
                self._steps = steps
                self._fill()
        self._steps, self._now_s = steps, to_s
        self.tokens += tokens
        finished: list[Group] = []
        while self._started and self._started[0][0] <= steps + ROUNDING:
            finished.append(heapq.heappop(self._started)[2])
        return finished

    def lose_all(self) -> None:
        """Forget every group: the engine is gone."""
        self._ends, self._started = [], []
        self._waiting.clear()
        self._still_until_s = 0.0

    def _fill(self) -> None:
        """Give the free places to waiting sequences."""
        while self._waiting and len(self._ends) < self._places:
            group, length = self._waiting.popleft()
            insort(self._ends, self._steps + length)
            self._begin(group, length, 1)

    def _begin(self, group: Group, longest: int, count: int) -> None:
        if group.version < 0:
            group.version = self.version
        group.last_end = max(group.last_end, self._steps + longest)
        group.unstarted -= count
        if not group.unstarted:
            self._count += 1
            heapq.heappush(self._started, (group.last_end, self._count, group))
