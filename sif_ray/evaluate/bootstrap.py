"""Confidence intervals of means by resampling whole scenes.

Questions about one image are not independent, so scenes (clusters) are drawn with replacement, each with all its items
(percentile bootstrap; Davison and Hinkley, "Bootstrap Methods and their Application", section 3.8).

Dimension suffixes: N items, K quantities, S scenes, B resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Seed = int | Sequence[int]

_NUMBERS_HELD = 1 << 22  # of a matrix in memory: about 32 MB


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

    scene_N, num_scenes = _scenes(scene_ids_N)
    sums_S_K = _sums(values_N_K, scene_N, num_scenes)
    counts_S = np.bincount(scene_N)

    means_B_K = np.concatenate(
        [(draws_BS @ sums_S_K) / (draws_BS @ counts_S)[:, None] for draws_BS in draws(num_scenes, num_samples, seed)]
    )
    tail = (1 - level) / 2
    low_K, high_K = np.quantile(means_B_K, [tail, 1 - tail], axis=0)
    return [
        Estimate(float(mean), float(low), float(high))
        for mean, low, high in zip(values_N_K.mean(axis=0), low_K, high_K, strict=True)
    ]


def ratio_resamples(
    numerators_N_K: npt.ArrayLike,
    denominators_N_K: npt.ArrayLike,
    scene_ids_N: Sequence[str],
    *,
    num_samples: int,
    seed: Seed,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Sum of numerators over sum of denominators, (K,) of the items and (B, K) of the resamples; NaN over 0.

    Equal scenes and seeds give equal draws, so that two calls on the same items are paired. Raises `ValueError` for no
    items or scene ids that do not match the rows.
    """
    parts_N_2K = np.concatenate([np.asarray(numerators_N_K, float), np.asarray(denominators_N_K, float)], axis=1)
    if not len(parts_N_2K) or len(scene_ids_N) != len(parts_N_2K):
        raise ValueError(f"{len(scene_ids_N)} scene ids for {len(parts_N_2K)} items; give one scene id per item")
    scene_N, num_scenes = _scenes(scene_ids_N)
    sums_S_2K = _sums(parts_N_2K, scene_N, num_scenes)
    totals_B_2K = np.concatenate([draws_BS @ sums_S_2K for draws_BS in draws(num_scenes, num_samples, seed)])
    with np.errstate(invalid="ignore", divide="ignore"):
        value_K = np.divide(*np.split(parts_N_2K.sum(axis=0), 2))
        values_B_K = np.divide(*np.split(totals_B_2K, 2, axis=1))
    return value_K, values_B_K


def draws(num_scenes: int, num_samples: int, seed: Seed, width: int = 1) -> Iterator[npt.NDArray[np.int64]]:
    """How often each scene is drawn, (some of the resamples, S): all that a mean needs to know of a resample.

    As many resamples at once as keep in memory what has S or `width` numbers for each.
    """
    rng = np.random.default_rng(seed)
    rows = max(1, _NUMBERS_HELD // max(num_scenes, width))
    for start in range(0, num_samples, rows):
        num_rows = min(rows, num_samples - start)
        drawn_BS = rng.integers(num_scenes, size=(num_rows, num_scenes))
        cells_BS = drawn_BS + num_scenes * np.arange(num_rows)[:, None]
        yield np.bincount(cells_BS.ravel(), minlength=num_rows * num_scenes).reshape(num_rows, num_scenes)


def _scenes(scene_ids_N: Sequence[str]) -> tuple[npt.NDArray[np.int64], int]:
    """The number of each item's scene, and how many scenes there are."""
    scenes, scene_N = np.unique(np.asarray(scene_ids_N), return_inverse=True)
    return scene_N, len(scenes)


def _sums(values_N_K: npt.NDArray[np.float64], scene_N: npt.NDArray[np.int64], num_scenes: int) -> npt.NDArray[Any]:
    sums_S_K = np.zeros((num_scenes, values_N_K.shape[1]))
    np.add.at(sums_S_K, scene_N, values_N_K)
    return sums_S_K


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
