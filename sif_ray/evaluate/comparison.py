"""Two policies on the same items: the difference of their scores, its interval and a test of significance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest

from sif_ray.evaluate.benchmarks.item import Benchmark, Reply
from sif_ray.evaluate.measure import CONVENTIONS, OVERALL, Convention, Measure, Ratios, Sampled, sample_all


def compare(
    benchmark: Benchmark, replies: Sequence[Reply], baseline: Sequence[Reply], *, num_samples: int, seed: int
) -> dict[str, Any]:
    """{convention: {measure: {group: {"difference", "ci95"}}}} and "mcnemar" of the headline measure's points.

    Both sides see the same resamples, so the interval is that of the paired difference. Raises `ValueError` where they
    are not replies to the same items in the same order.
    """
    if [reply.item for reply in replies] != [reply.item for reply in baseline]:
        raise ValueError("the two sides of a paired comparison hold different items")
    measures, baselines = benchmark.measure(replies), benchmark.measure(baseline)
    result: dict[str, Any] = {
        convention: {"mcnemar": mcnemar(measures[0], baselines[0], convention)} for convention in CONVENTIONS
    }
    for ours, theirs in zip(measures, baselines, strict=True):
        sampled, of_baseline = sample_all(ours, num_samples, seed), sample_all(theirs, num_samples, seed)
        for convention in CONVENTIONS:
            result[convention][ours.name] = {
                group: _difference(found, of_baseline[convention][group])
                for group, found in sampled[convention].items()
            }
    return result


def _difference(found: Sampled, baseline: Sampled) -> dict[str, Any]:
    paired = Sampled(found.value - baseline.value, found.values_B - baseline.values_B, found.n)
    return {"difference": paired.value if np.isfinite(paired.value) else None, "ci95": paired.interval(), "n": found.n}


def mcnemar(ours: Measure, theirs: Measure, convention: Convention) -> dict[str, Any] | None:
    """McNemar's exact test: {"only_ours", "only_baseline", "p"}; None where points are not right or wrong.

    Two-sided binomial test of the pairs on which the two differ (McNemar, Psychometrika 12, 1947).
    """
    if not isinstance(ours, Ratios) or not isinstance(theirs, Ratios):
        return None
    ratios_N2, theirs_N2 = _ratios(ours, convention), _ratios(theirs, convention)
    both_N = (ratios_N2[:, 1] != 0) & (theirs_N2[:, 1] != 0)  # what one of them has no verdict on is no pair
    a, b = _right(ratios_N2[both_N]), _right(theirs_N2[both_N])
    if a is None or b is None:
        return None
    only_ours, only_baseline = int(np.count_nonzero(a & ~b)), int(np.count_nonzero(b & ~a))
    differing = only_ours + only_baseline
    p = float(binomtest(only_ours, differing).pvalue) if differing else 1.0
    return {"only_ours": only_ours, "only_baseline": only_baseline, "p": p}


def _ratios(measure: Ratios, convention: Convention) -> np.ndarray:
    """(N, 2): what every point adds to numerator and denominator."""
    groups = [OVERALL] if OVERALL in measure.points else list(measure.points)
    return np.array([getattr(point, convention) for group in groups for point in measure.points[group]])


def _right(counted_N2: np.ndarray) -> np.ndarray | None:
    """Of every point that counts whether it is right; None where a point is neither right nor wrong."""
    if not np.isin(counted_N2[:, 0], (0.0, 1.0)).all() or not (counted_N2[:, 1] == 1).all():
        return None
    right_N: np.ndarray = counted_N2[:, 0] == 1
    return right_N
