"""Reward workers and the judge behind them, on a virtual clock."""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_right

import numpy as np

from sif_ray.plan.scenario import Scenario

BLOCK = 65_536  # latencies drawn at a time


class Scorers:
    """Groups are scored by the worker with the least to do. A worker reads one group after the other, then asks the
    judge for all of its answers at once, within its share of the calls in flight."""

    def __init__(self, scenario: Scenario, rng: np.random.Generator, outages: Outages) -> None:
        self._rng, self._outages = rng, outages
        self._rates = scenario.rates
        workers = scenario.num_reward_workers
        self._under_way = [0] * workers  # groups, by worker
        self._by_load = [(0, worker) for worker in range(workers)]  # heap, outdated entries too
        self._free_s = [0.0] * workers  # when a worker has read all of its groups
        calls = max(1, scenario.judge_calls // workers)  # as `sif_ray.judge.caller` divides them
        self._calls_free_s = [[0.0] * calls for _ in range(workers)]  # heaps: when each call in flight ends
        self._latencies: list[float] = []
        self.calls_s = 0.0  # of all calls together
        self.busy_s = 0.0  # of all workers, in which they had a group
        self._since_s = [0.0] * workers

    def score(self, group_size: int, now_s: float) -> tuple[float, int]:
        """When the group has its rewards, and which worker has it."""
        worker = self._idlest()
        if not self._under_way[worker]:
            self._since_s[worker] = now_s
        self._count(worker, +1)
        read_s = max(now_s, self._free_s[worker]) + self._rates.score_s
        self._free_s[worker] = read_s
        if not self._rates.judge_latency_s:
            return read_s, worker
        free_s, ended_s, outages = self._calls_free_s[worker], read_s, self._outages.any
        latencies = self._draw(group_size)
        self.calls_s += sum(latencies)
        for latency_s in latencies:
            begin_s = free_s[0] if free_s[0] > read_s else read_s
            if outages:
                begin_s = self._outages.up_at(begin_s)
            end_s = begin_s + latency_s
            heapq.heapreplace(free_s, end_s)
            if end_s > ended_s:
                ended_s = end_s
        return ended_s, worker

    def done(self, worker: int, now_s: float) -> None:
        """The worker has handed a group over."""
        self._count(worker, -1)
        if not self._under_way[worker]:
            self.busy_s += now_s - self._since_s[worker]

    def _count(self, worker: int, change: int) -> None:
        self._under_way[worker] += change
        heapq.heappush(self._by_load, (self._under_way[worker], worker))

    def _idlest(self) -> int:
        while True:
            load, worker = heapq.heappop(self._by_load)
            if self._under_way[worker] == load:
                return worker

    def reset(self, now_s: float) -> None:
        """The run starts again: nobody waits for what is under way."""
        for worker, count in enumerate(self._under_way):
            if count:
                self.busy_s += now_s - self._since_s[worker]
        self._under_way = [0] * len(self._under_way)
        self._by_load = [(0, worker) for worker in range(len(self._under_way))]
        self._free_s = [now_s] * len(self._free_s)
        self._calls_free_s = [[now_s] * len(calls) for calls in self._calls_free_s]

    def _draw(self, count: int) -> list[float]:
        """Latencies of that many calls."""
        if len(self._latencies) < count:
            variance = math.log(1 + self._rates.judge_latency_cv**2)
            mean = math.log(self._rates.judge_latency_s) - variance / 2
            self._latencies = self._rng.lognormal(mean, math.sqrt(variance), max(BLOCK, count)).tolist()
        drawn = self._latencies[-count:]
        del self._latencies[-count:]
        return drawn


class Outages:
    """When the judge is down: at exponentially distributed intervals, each time for as long."""

    def __init__(self, every_h: float, seconds: float, rng: random.Random) -> None:
        self.any = every_h > 0
        self._every_s, self._seconds, self._rng = every_h * 3600, seconds, rng
        self._begins_s: list[float] = []
        self._known_s = 0.0  # outages up to here are drawn

    def up_at(self, now_s: float) -> float:
        """`now_s`, or the end of the outage in which it lies; only where there are `any`."""
        while self._known_s <= now_s:
            begin_s = self._known_s + self._rng.expovariate(1 / self._every_s)
            self._begins_s.append(begin_s)
            self._known_s = begin_s + self._seconds
        last = bisect_right(self._begins_s, now_s) - 1
        return max(now_s, self._begins_s[last] + self._seconds) if last >= 0 else now_s
