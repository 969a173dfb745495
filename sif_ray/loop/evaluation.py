"""Evaluation on held-out samples during training, pinned to one policy version.

The loop lends an engine that holds version V and postpones that engine's next weight update until it has answered, so
that every token is of version V. The engine goes on with training prompts at V as far as the staleness window lets it,
and the other engines do not notice. Answers are greedy and are scored by the terms that reward training, without
progress bonus.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager

import numpy as np

from sif_ray.clock import now_s
from sif_ray.config import GrpoConfig
from sif_ray.loop.pool import WorkerDiedError
from sif_ray.loop.requests import Ask, check_version, heldout_request
from sif_ray.loop.rewarder import GroupScores, ScoringFailed
from sif_ray.loop.watchdog import noting
from sif_ray.records import RolloutGroup, Sample
from sif_ray.rollout.errors import RolloutRequestError

log = logging.getLogger(__name__)

TERMS = ("format", "answer", "box", "depth", "iou_last")

Pinned = Callable[[int], AbstractAsyncContextManager[Ask | None]]
"""Lends an engine that keeps a version inside the body; None when none holds it any more."""
Score = Callable[[str, Sample], Awaitable[GroupScores | ScoringFailed]]
"""The reward of one answer."""


class Evaluations:
    """Which versions are evaluated, one at a time, every `eval_every` steps and at the end."""

    def __init__(self, config: GrpoConfig, samples: Sequence[Sample], *, pinned: Pinned, score: Score) -> None:
        self._config = config
        self._samples = samples
        self._pinned = pinned
        self._score = score
        self._running: asyncio.Task[None] | None = None
        self._version = -1  # evaluated last
        self._values: dict[str, float] = {}  # of an evaluation that has ended, not taken yet

    def start_if_due(self, version: int, tasks: asyncio.TaskGroup) -> None:
        """Start to evaluate the version that was just published; the loop goes on meanwhile."""
        if not self._config.eval_every or version % self._config.eval_every:
            return
        if self._running is not None and not self._running.done():
            log.warning("version %d is not evaluated: the evaluation before still runs; raise eval_every", version)
            return
        self._running = tasks.create_task(self._evaluate(version), name="evaluate")

    def take(self) -> dict[str, float]:
        """Metrics of the evaluation that has ended since; {} when none has."""
        values, self._values = self._values, {}
        return values

    async def rest(self, version: int) -> AsyncIterator[dict[str, float]]:
        """Metrics of the evaluation that runs, and of the last version, if it was not evaluated yet."""
        if self._running is not None:
            await self._running
        if self._config.eval_every and self._version != version:
            if values := self.take():
                yield values
            await self._evaluate(version)
        if values := self.take():
            yield values

    def cancel(self) -> None:
        """Give the evaluation that runs up."""
        if self._running is not None:
            self._running.cancel()

    async def _evaluate(self, version: int) -> None:
        self._version = version
        with noting(f"version {version} was evaluated"):
            self._values = await Evaluation(
                self._config, self._samples, version, pinned=self._pinned, score=self._score
            ).run()


class Evaluation:
    """The answers of one policy version to held-out samples."""

    def __init__(
        self, config: GrpoConfig, samples: Sequence[Sample], version: int, *, pinned: Pinned, score: Score
    ) -> None:
        self._config = config
        self._samples = samples
        self._version = version
        self._pinned = pinned
        self._score = score
        self._groups: dict[str, RolloutGroup] = {}  # by sample id
        self._scores: dict[str, GroupScores] = {}
        self._refused: dict[str, str] = {}  # no answer or no verdict, and why

    async def run(self) -> dict[str, float]:
        """Means over the samples that count as "eval/total", "eval/box", ...; "eval/refused" is the number of those
        that do not, because no engine can answer them or the judge has no verdict. {} when the engines that held the
        version died: half an evaluation has no meaning."""
        started_s = now_s()
        while missing := [sample for sample in self._samples if not self._has_answer(sample)]:
            async with self._pinned(self._version) as ask:
                if ask is None:
                    log.warning("the evaluation of version %d is given up: no engine holds it any more", self._version)
                    return {}
                await self._answer(missing, ask)
        async with asyncio.TaskGroup() as scoring:
            for sample in self._samples:
                if sample.sample_id in self._groups:
                    scoring.create_task(self._score_one(sample))
        return self._metrics() | {"eval/seconds": now_s() - started_s}

    def _has_answer(self, sample: Sample) -> bool:
        return sample.sample_id in self._groups or sample.sample_id in self._refused

    async def _answer(self, samples: Sequence[Sample], ask: Ask) -> None:
        """Every sample by one engine; those that it leaves when it dies stay without an answer."""
        slots = asyncio.Semaphore(self._config.engine.max_num_seqs)  # few images are under way

        async def answer(sample: Sample) -> None:
            async with slots:
                try:
                    ticket_id = f"eval/{self._version}/{sample.sample_id}"
                    group = await ask(heldout_request(self._config, sample, ticket_id))
                except WorkerDiedError:
                    return
                except RolloutRequestError as error:
                    self._refuse(sample, str(error))
                    return
            check_version(group, self._version, f"evaluation of version {self._version}, sample {sample.sample_id}")
            self._groups[sample.sample_id] = group

        async with asyncio.TaskGroup() as answers:
            for sample in samples:
                answers.create_task(answer(sample))

    async def _score_one(self, sample: Sample) -> None:
        scores = await self._score(self._groups[sample.sample_id].rollouts[0].text, sample)
        if isinstance(scores, ScoringFailed):
            self._refuse(sample, scores.reason)
        else:
            self._scores[sample.sample_id] = scores

    def _refuse(self, sample: Sample, reason: str) -> None:
        log.warning("version %d: held-out sample %s does not count: %s", self._version, sample.sample_id, reason)
        self._refused[sample.sample_id] = reason

    def _metrics(self) -> dict[str, float]:
        values = {"eval/version": float(self._version), "eval/refused": float(len(self._refused))}
        if self._scores:
            rollouts = [self._groups[name].rollouts[0] for name in self._scores]
            values["eval/total"] = _mean([scores.rewards_G[0] for scores in self._scores.values()])
            for term in TERMS:
                values[f"eval/{term}"] = _mean([scores.terms_G[term][0] for scores in self._scores.values()])
            values["eval/completion_tokens_mean"] = _mean([len(rollout.token_ids_T) for rollout in rollouts])
            values["eval/truncated_share"] = _mean([rollout.finish_reason == "length" for rollout in rollouts])
        return values


def choose(samples: Mapping[str, Sample], count: int, seed: int) -> list[Sample]:
    """At most `count` samples, the same ones for the same seed."""
    names = sorted(samples)
    return [samples[name] for name in random.Random(f"{seed}/eval").sample(names, min(count, len(names)))]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
