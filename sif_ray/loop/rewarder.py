"""Rewards of one group of rollouts. Plain Python; `sif_ray.loop.reward_actor` makes it an actor."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sif_ray.config import RewardConfig
from sif_ray.judge.outcome import Abstained, Failed, Judge, JudgeUnavailable, Outcome, Scored, Unavailable
from sif_ray.judge.scoring import read_depth, score_terms, weighted_total
from sif_ray.method.trace import find_answer
from sif_ray.records import FloatArray, Sample


@dataclass(frozen=True)
class GroupScores:
    """Rewards of G texts that answer one sample."""

    rewards_G: FloatArray  # (G,), weighted sum of the reward terms
    terms_G: dict[str, FloatArray]  # unweighted, by name: those of `judge.scoring.score_terms`


@dataclass(frozen=True)
class ScoringFailed:
    """The group has no rewards, because at least one of its answers has no verdict. That is not a reward of 0."""

    reason: str
    retry: bool  # False: the judge will have no verdict next time either


class Rewarder:
    """The rewards of GRPO-SIF (paper: R = r_format + r_ans + r_bbox + r_depth) under given weights.

    Example: `await Rewarder(RewardConfig(), "corrected", ExactMatchJudge()).score(texts_G, sample, previous=0.5)`.
    """

    def __init__(self, weights: RewardConfig, profile: str, judge: Judge) -> None:
        self._weights = weights
        self._profile = profile
        self._judge = judge

    async def score(
        self, texts_G: Sequence[str], sample: Sample, previous: float | None
    ) -> GroupScores | ScoringFailed:
        """Score the G texts of one group; `previous` is the sample's answer score one epoch ago, None = no bonus.

        Raises `JudgeUnavailable`.
        """
        scores_G: list[float] = []
        for outcome in await asyncio.gather(*(self._judge_answer(text, sample) for text in texts_G)):
            if isinstance(outcome, Unavailable):
                raise JudgeUnavailable(f"{outcome.advice}; start the run again once it answers, nothing is lost")
            if not isinstance(outcome, Scored):
                return ScoringFailed(_reason(outcome), retry=isinstance(outcome, Failed))
            scores_G.append(outcome.score)
        depth_rel = read_depth(sample.depth_image, self._profile)
        terms = [
            score_terms(
                text,
                target_boxes=sample.boxes,
                target_answer=sample.answer,
                depth_rel=depth_rel,
                answer_score=score,
                previous=previous,
                profile=self._profile,
            )
            for text, score in zip(texts_G, scores_G, strict=True)
        ]
        return GroupScores(
            rewards_G=np.array([weighted_total(of_text, self._weights) for of_text in terms], np.float32),
            terms_G={name: np.array([of_text[name] for of_text in terms], np.float32) for name in terms[0]},
        )

    def metrics(self) -> dict[str, float]:
        """Totals of the judge, see `sif_ray.judge.outcome.Judge`."""
        return self._judge.metrics()

    async def _judge_answer(self, text: str, sample: Sample) -> Outcome:
        answer = find_answer(text)
        if answer is None:
            return Scored(0.0)
        return await self._judge.judge(sample.question, sample.answer, answer, sample.image)


def _reason(outcome: Failed | Abstained) -> str:
    return f"judge {'failed' if isinstance(outcome, Failed) else 'abstained'}: {outcome.reason}"
