"""Engines, scorers and a learner in one process, with random delays: what the loop's control flow is tested with."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import torch

from sif_ray.config import EngineConfig, GrpoConfig
from sif_ray.loop.checkpoint import RunState
from sif_ray.loop.grpo import GrpoLoop
from sif_ray.loop.ledger import Ledger
from sif_ray.loop.pool import WorkerDiedError
from sif_ray.loop.rewarder import GroupScores, ScoringFailed
from sif_ray.method.progress import ProgressRecord
from sif_ray.records import Rollout, RolloutGroup, Sample
from sif_ray.rollout.errors import EngineDiedError
from sif_ray.rollout.weights import Receipt, make_update

TERMS = ("format", "answer", "box", "depth", "search", "binary", "iou_last", "answer_score")


class FakeEngine:
    """Writes ten tokens per rollout, five before and five after a delay; labels them with the version it holds."""

    def __init__(self, rng: random.Random, slow_s: float = 0.01) -> None:
        self.rng, self.slow_s = rng, slow_s
        self.version = 0
        self.requests: list[Any] = []

    async def generate(self, request) -> RolloutGroup:
        self.requests.append(request)
        first = self.version
        await asyncio.sleep(self.rng.random() * self.slow_s)
        spans = ((first, 10),) if self.version == first else ((first, 5), (self.version, 5))
        rollout = Rollout(np.arange(10, dtype=np.int32), np.full(10, -1.0, np.float32), spans, "stop", "text")
        ids = np.arange(3, dtype=np.int32)
        grid = ((1, 4, 4),) * len(request.images)
        return RolloutGroup(
            request.ticket_id, request.sample_id, ids, request.images, grid, (rollout,) * request.num_rollouts
        )

    async def update_weights(self, update) -> Receipt:
        await asyncio.sleep(self.rng.random() * self.slow_s)
        self.version = update.version
        return Receipt(
            update.version, len(update.tensors), update.num_bytes, update.checksum, "fake", seconds=0.0, pause_s=0.0
        )


class Mortal:
    """Calls that fail once `die` was called, and by chance."""

    def __init__(self, rng: random.Random, error: type[Exception], death_rate: float) -> None:
        self.rng, self.error, self.death_rate = rng, error, death_rate
        self.death = asyncio.Event()

    def die(self) -> None:
        self.death.set()

    async def call(self, answer: Awaitable[Any]) -> Any:
        if self.rng.random() < self.death_rate:
            self.die()
        tasks = [asyncio.ensure_future(answer), asyncio.ensure_future(self.death.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if self.death.is_set():
                raise self.error("killed by the test")
            return tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class MortalEngine(FakeEngine):
    """Dies with `life.die()`, and by chance at any call."""

    def __init__(self, rng: random.Random, slow_s: float = 0.01, death_rate: float = 0.0) -> None:
        super().__init__(rng, slow_s)
        self.life = Mortal(rng, EngineDiedError, death_rate)

    async def generate(self, request) -> RolloutGroup:
        return await self.life.call(super().generate(request))

    async def update_weights(self, update) -> Receipt:
        return await self.life.call(super().update_weights(update))


class FakeScorer:
    def __init__(self, rng: random.Random, slow_s: float = 0.01) -> None:
        self.rng, self.slow_s = rng, slow_s
        self.previous: dict[str, list[float | None]] = {}

    async def score(self, texts_G, sample, previous) -> GroupScores | ScoringFailed:
        await asyncio.sleep(self.rng.random() * self.slow_s)
        self.previous.setdefault(sample.sample_id, []).append(previous)
        scores_G = np.linspace(0, 1, len(texts_G), dtype=np.float32)
        return GroupScores(scores_G, dict.fromkeys(TERMS, scores_G))

    async def metrics(self) -> dict[str, float]:
        calls = sum(len(previous) for previous in self.previous.values())
        return {"judge/calls": float(calls), "judge/latency_p95_s": 0.5}


class MortalScorer(FakeScorer):
    """Dies with `life.die()`, and by chance at any call."""

    def __init__(self, rng: random.Random, slow_s: float = 0.01, death_rate: float = 0.0) -> None:
        super().__init__(rng, slow_s)
        self.life = Mortal(rng, WorkerDiedError, death_rate)

    async def score(self, texts_G, sample, previous) -> GroupScores | ScoringFailed:
        return await self.life.call(super().score(texts_G, sample, previous))


class FakeFactory:
    """Starts the workers of a list in turn, then what `make` makes."""

    def __init__(self, workers: list[Any], make: Callable[[], Any], rng: random.Random, slow_s: float) -> None:
        self.workers, self.make, self.rng, self.slow_s = workers, make, rng, slow_s
        self.started: list[tuple[str, Any]] = []
        self.ended: list[Any] = []

    async def start(self, name: str) -> Any:
        worker = self.workers[len(self.started)] if len(self.started) < len(self.workers) else self.make()
        self.started.append((name, worker))
        try:
            await asyncio.sleep(self.rng.random() * self.slow_s)
        except asyncio.CancelledError:
            self.ended.append(worker)
            raise
        return worker

    async def end(self, worker: Any) -> None:
        self.ended.append(worker)

    async def stacks(self, worker: Any) -> str:
        return f"in {type(worker).__name__}"


class FakeLearner:
    """Remembers what it was trained on."""

    def __init__(self, rng: random.Random, slow_s: float = 0.01) -> None:
        self.rng, self.slow_s = rng, slow_s
        self.version = 0
        self.trained: list[str] = []
        self.staleness: list[int] = []
        self.probed_at: list[int] = []

    async def train(self, groups, version) -> dict[str, float]:
        assert version == self.version
        await asyncio.sleep(self.rng.random() * self.slow_s)
        self.trained += [scored.group.ticket_id for scored in groups]
        self.staleness += [version - scored.group.oldest_version for scored in groups]
        self.version += 1
        return {"loss": 0.5}

    async def publish(self, version):
        assert version == self.version
        return make_update(version, [[("weight", torch.full((4,), float(version)))]])

    async def log_probs(self, groups):
        self.probed_at.append(self.version)
        assert all(group.oldest_version == group.newest_version == self.version for group in groups)
        return [[rollout.logprobs_T + 0.25 for rollout in group.rollouts] for group in groups]


class Recorder:
    """Metrics, timeline, trail and saved states in memory."""

    def __init__(self) -> None:
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.spans: list[tuple[str, str, float, float, int]] = []
        self.trail: list[tuple[int, list[str]]] = []
        self.saved: list[RunState] = []

    def log(self, step, values) -> None:
        self.metrics.append((step, dict(values)))

    def span(self, lane, kind, start_s, end_s, **labels) -> None:
        self.spans.append((lane, kind, start_s, end_s, labels["step"]))

    def trained(self, version, trained) -> None:
        self.trail.append((version, list(trained)))

    async def save(self, state) -> None:
        self.saved.append(state)


class Rig:
    """A loop of fakes. Replace a part before `run`."""

    def __init__(
        self, *, num_prompts: int = 14, num_engines: int = 2, seed: int = 0, slow_s: float = 0.01, **changes: Any
    ) -> None:
        rng = random.Random(seed)
        settings = {
            "groups_per_step": 3,
            "group_size": 2,
            "max_staleness": 1,
            "lease_timeout_s": 30.0,
            "parity_every": 2,
            "num_engines": num_engines,
        }
        self.config = GrpoConfig(**(settings | {"engine": EngineConfig(max_num_seqs=8)} | changes))
        self.samples = {name: _sample(name) for name in (f"p{i}" for i in range(num_prompts))}
        self.ledger = Ledger(
            list(self.samples),
            epochs=self.config.epochs,
            groups_per_step=self.config.groups_per_step,
            max_staleness=self.config.max_staleness,
            lease_timeout_s=self.config.lease_timeout_s,
            now_s=lambda: asyncio.get_running_loop().time(),
        )
        self.engines: list[Any] = [FakeEngine(rng, slow_s) for _ in range(num_engines)]
        self.scorers: list[Any] = [FakeScorer(rng, slow_s)]
        self.engine_factory = FakeFactory([], lambda: FakeEngine(rng, slow_s), rng, slow_s)
        self.scorer_factory = FakeFactory([], lambda: FakeScorer(rng, slow_s), rng, slow_s)
        self.eval_samples: list[Sample] = []
        self.learner: Any = FakeLearner(rng, slow_s)
        self.learner_ready: Callable[[], Any] | None = None
        self.recorder = Recorder()

    def run(self, beside: Callable[[asyncio.Task], Any] | None = None) -> Rig:
        async def main() -> None:
            self.engine_factory.workers, self.scorer_factory.workers = self.engines, self.scorers
            self.loop = loop = GrpoLoop(
                self.config,
                self.samples,
                self.ledger,
                ProgressRecord(),
                engines=self.engine_factory,
                scorers=self.scorer_factory,
                learner=self.learner,
                metrics=self.recorder,
                timeline=self.recorder,
                trail=self.recorder,
                save=self.recorder.save,
                eval_samples=self.eval_samples,
            )
            task = asyncio.create_task(loop.run(self.learner_ready() if self.learner_ready else None))
            if beside is not None:
                await beside(task)
            try:
                await asyncio.wait_for(task, 30)
            finally:
                left = [other for other in asyncio.all_tasks() if other is not asyncio.current_task()]
                assert not left, f"tasks left running: {left}"

        asyncio.run(main())
        return self


def _sample(name: str) -> Sample:
    return Sample(name, name, "toy", "grpo", "What?", "", "x", (), 8, 8, b"rgb", b"depth", "exact", "image")
