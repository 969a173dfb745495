"""Scores of one output text against its sample, by the very functions that reward training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from sif_ray.config import RewardConfig
from sif_ray.judge.exact import ExactMatchJudge
from sif_ray.judge.scoring import score_terms, weighted_total
from sif_ray.method.trace import find_answer
from sif_ray.records import Sample

TERMS = ("format", "answer", "box", "depth", "iou_last", "total")
"""What is reported of every answer. "total" is the weighted reward without progress bonus, "iou_last" the hierarchical
IoU of the last area with the evidence."""


def score_text(
    sample: Sample,
    depth_rel: npt.NDArray[np.float64],
    text: str,
    profile: str,
    weights: RewardConfig,
    judge: ExactMatchJudge,
) -> dict[str, float]:
    """The `TERMS` of `text`. `depth_rel` is the sample's own depth map, (height, width), 0 = near.

    A text without an answer block scores 0 for the answer.
    """
    prediction = find_answer(text)
    right = prediction is not None and judge.same(sample.question, sample.answer, prediction)
    terms = score_terms(
        text,
        target_boxes=sample.boxes,
        target_answer=sample.answer,
        depth_rel=depth_rel,
        answer_score=float(right),
        previous=None,
        profile=profile,
    )
    terms["total"] = weighted_total(terms, weights)
    return {name: terms[name] for name in TERMS}


def majority_shares(samples: Sequence[Sample]) -> dict[str, float]:
    """By question type, how often its most frequent answer is right: the best that a constant answer can do."""
    answers: dict[str, Counter[str]] = {}
    for sample in samples:
        answers.setdefault(sample.question_type, Counter())[sample.answer.strip().casefold()] += 1
    return {kind: max(counts.values()) / counts.total() for kind, counts in sorted(answers.items())}


def chances(samples: Sequence[Sample], designed: Mapping[str, float]) -> dict[str, float]:
    """By question type, what a guess without the image earns: as designed, else the majority share."""
    return {kind: designed.get(kind, share) for kind, share in majority_shares(samples).items()}
