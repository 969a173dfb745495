"""Confidence intervals of means by resampling whole scenes.

Questions about one image are not independent, so scenes (clusters) are drawn with replacement, each with all its items
(percentile bootstrap; Davison and Hinkley, "Bootstrap Methods and their Application", section 3.8).

Dimension suffixes: N items, K quantities, S scenes, B resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval. Example: `Estimate(mean=0.71, low=0.66, high=0.75)`."""

    mean: float
    low: float
    high: float


def mean_intervals(
    values_N_K: npt.ArrayLike, scene_ids_N: Sequence[str], *, num_samples: int, seed: int, level: float = 0.95
) -> list[Estimate]:
    """The mean over items of each of K quantities with its scene-level interval, in the order of the columns.

    All columns see the same resamples. Raises `ValueError` for no items, a number that is not finite, or scene ids that
    do not match the rows.
    """
    values_N_K = np.asarray(values_N_K, dtype=np.float64)
    if values_N_K.ndim != 2 or not len(values_N_K):
        raise ValueError(f"values_N_K has shape {values_N_K.shape}; it needs one row per item and at least one item")
    if len(scene_ids_N) != len(values_N_K):
        raise ValueError(f"{len(scene_ids_N)} scene ids for {len(values_N_K)} rows; give one scene id per row")
    if not np.isfinite(values_N_K).all():
        raise ValueError("values_N_K holds a number that is not finite; leave out items without a score")

    scenes, scene_N = np.unique(np.asarray(scene_ids_N), return_inverse=True)
    sums_S_K = np.zeros((len(scenes), values_N_K.shape[1]))
    np.add.at(sums_S_K, scene_N, values_N_K)
    counts_S = np.bincount(scene_N)

    rng = np.random.default_rng(seed)
    # How often each scene is drawn is all that a mean needs to know of a resample.
    draws_B_S = rng.multinomial(len(scenes), np.full(len(scenes), 1 / len(scenes)), size=num_samples)
    means_B_K = (draws_B_S @ sums_S_K) / (draws_B_S @ counts_S)[:, None]
    tail = (1 - level) / 2
    low_K, high_K = np.quantile(means_B_K, [tail, 1 - tail], axis=0)
    return [
        Estimate(float(mean), float(low), float(high))
        for mean, low, high in zip(values_N_K.mean(axis=0), low_K, high_K, strict=True)
    ]


def paired_intervals(
    values_N_K: npt.ArrayLike, baseline_N_K: npt.ArrayLike, scene_ids_N: Sequence[str], *, num_samples: int, seed: int
) -> list[Estimate]:
    """The mean of `values - baseline` on the same items, row by row, with its scene-level 95 % interval."""
    values_N_K, baseline_N_K = np.asarray(values_N_K, dtype=np.float64), np.asarray(baseline_N_K, dtype=np.float64)
    if values_N_K.shape != baseline_N_K.shape:
        raise ValueError(
            f"shapes {values_N_K.shape} and {baseline_N_K.shape} differ; a pair needs the same items in both"
        )
    return mean_intervals(values_N_K - baseline_N_K, scene_ids_N, num_samples=num_samples, seed=seed)
