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
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace

import numpy as np

from sif_ray.config import GrpoConfig
from sif_ray.loop.pool import WorkerDiedError
from sif_ray.loop.rewarder import GroupScores, ScoringFailed
from sif_ray.records import RolloutGroup, Sample
from sif_ray.rollout.engine import RolloutRequest
from sif_ray.rollout.errors import RolloutRequestError

log = logging.getLogger(__name__)

TERMS = ("format", "answer", "box", "depth", "iou_last")

Ask = Callable[[RolloutRequest], Awaitable[RolloutGroup]]
Score = Callable[[str, Sample], Awaitable[GroupScores | ScoringFailed]]


class VersionError(RuntimeError):
    """An engine that should have kept its version has answered with another one."""


class Evaluation:
    """The answers of one policy version to held-out samples.

    `pinned(version)` lends an engine that keeps the version, or None when none holds it any more; `score(text, sample)`
    is the reward of one answer.
    """

    def __init__(
        self,
        config: GrpoConfig,
        samples: Sequence[Sample],
        version: int,
        *,
        pinned: Callable[[int], AbstractAsyncContextManager[Ask | None]],
        score: Score,
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
        started_s = time.monotonic()
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
        return self._metrics() | {"eval/seconds": time.monotonic() - started_s}

    def _has_answer(self, sample: Sample) -> bool:
        return sample.sample_id in self._groups or sample.sample_id in self._refused

    async def _answer(self, samples: Sequence[Sample], ask: Ask) -> None:
        """Every sample by one engine; those that it leaves when it dies stay without an answer."""
        slots = asyncio.Semaphore(self._config.engine.max_num_seqs)  # few images are under way

        async def answer(sample: Sample) -> None:
            async with slots:
                try:
                    group = await ask(self._request(sample))
                except WorkerDiedError:
                    return
                except RolloutRequestError as error:
                    self._refuse(sample, str(error))
                    return
            if not group.oldest_version == group.newest_version == self._version:
                raise VersionError(
                    f"evaluation of version {self._version}: tokens of sample {sample.sample_id} are of versions "
                    f"{group.oldest_version} to {group.newest_version}"
                )
            self._groups[sample.sample_id] = group

        async with asyncio.TaskGroup() as answers:
            for sample in samples:
                answers.create_task(answer(sample))

    def _request(self, sample: Sample) -> RolloutRequest:
        return RolloutRequest(
            ticket_id=f"eval/{self._version}/{sample.sample_id}",
            sample_id=sample.sample_id,
            question=sample.question,
            images=sample.prompt_images(self._config.prompt.depth_image),
            num_rollouts=1,
            sampling=replace(self._config.sampling, temperature=0.0, top_p=1.0, top_k=0),
        )

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
