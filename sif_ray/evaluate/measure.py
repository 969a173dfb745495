"""Scores as ratios of sums, in two conventions, with bootstrap resamples that belong together.

Accuracy, points per pair, F1 and means over data sets are all sums of ratios, so one way of resampling does for them:
scenes are drawn with replacement inside every group (`sif_ray.evaluate.bootstrap`). Equal scenes and an equal seed give
equal draws, so the resamples of two policies on the same items are paired.

Dimension suffixes: N points, B resamples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from sif_ray.evaluate.bootstrap import Seed, ratio_resamples

Convention = Literal["strict", "published"]
CONVENTIONS: tuple[Convention, ...] = ("strict", "published")
"""Strict: only what was answered, and rightly, counts. Published: as the released scripts count, defects included."""

OVERALL = "overall"
"""The name of a measure's headline."""

Ratio = tuple[float, float]
"""What a point adds to numerator and denominator; (0, 0) = it does not count."""


class Point(NamedTuple):
    """What one item, or one pair of items, adds to a score.

    Example: `Point("beach.jpg", strict=(0.0, 1.0), published=(1.0, 1.0))`.
    """

    scene_id: str
    strict: Ratio
    published: Ratio


def point(scene_id: str, strict: float, published: float) -> Point:
    """A point of a mean: its two values count once each."""
    return Point(scene_id, (float(strict), 1.0), (float(published), 1.0))


@dataclass(frozen=True)
class Sampled:
    """A score and its values in the resamples; NaN where nothing counts."""

    value: float
    values_B: npt.NDArray[np.float64]
    n: int

    def interval(self, level: float = 0.95) -> list[float] | None:
        """The percentile interval, None without a value."""
        finite_B = self.values_B[np.isfinite(self.values_B)]
        if not len(finite_B) or not np.isfinite(self.value):
            return None
        tail = (1 - level) / 2
        return [float(bound) for bound in np.quantile(finite_B, [tail, 1 - tail])]

    def summary(self) -> dict[str, Any]:
        """{"score", "ci95", "n"}; score and interval are None where nothing counts."""
        return {"score": self.value if np.isfinite(self.value) else None, "ci95": self.interval(), "n": self.n}


class Measure(Protocol):
    """A kind of score over groups of items."""

    @property
    def name(self) -> str:
        """What the numbers are."""

    @property
    def totals(self) -> Mapping[str, Mapping[str, float]]:
        """Sums over groups, {name: {group: weight}}; the headline's :data:`OVERALL` is here or a group itself."""

    def groups(self) -> Sequence[str]:
        """The groups, in the order of the tables."""

    def sampled(self, group: str, num_samples: int, seed: Seed) -> dict[Convention, Sampled]:
        """The scores of one group with `num_samples` resamples, the same ones for both."""


@dataclass(frozen=True)
class Ratios:
    """A measure whose score of a group is the sum of its points' numerators over that of their denominators."""

    name: str
    points: Mapping[str, Sequence[Point]]
    totals: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def groups(self) -> Sequence[str]:
        return list(self.points)

    def sampled(self, group: str, num_samples: int, seed: Seed) -> dict[Convention, Sampled]:
        points = self.points[group]
        ratios_N22 = np.array([(point.strict, point.published) for point in points])
        scenes = [point.scene_id for point in points]
        values_2, values_B2 = ratio_resamples(
            ratios_N22[..., 0], ratios_N22[..., 1], scenes, num_samples=num_samples, seed=seed
        )
        counted_2 = np.count_nonzero(ratios_N22[..., 1], axis=0)
        return {
            convention: Sampled(float(values_2[k]), values_B2[:, k], int(counted_2[k]))
            for k, convention in enumerate(CONVENTIONS)
        }


def grouped(points: Iterable[tuple[str, Point]]) -> dict[str, list[Point]]:
    """{group: its points}, in the order of first appearance."""
    groups: dict[str, list[Point]] = {}
    for group, found in points:
        groups.setdefault(group, []).append(found)
    return groups


def pooled(name: str, points: Iterable[tuple[str, Point]]) -> Ratios:
    """A measure whose headline is over all points, whatever group they are of."""
    groups = grouped(points)
    return Ratios(name, {OVERALL: [found for group in groups.values() for found in group], **groups})


def sample_all(measure: Measure, num_samples: int, seed: int) -> dict[Convention, dict[str, Sampled]]:
    """Every total and every group of a measure, totals first."""
    sampled = {
        group: measure.sampled(group, num_samples, (seed, index)) for index, group in enumerate(measure.groups())
    }
    return {
        convention: _with_totals(measure.totals, {group: found[convention] for group, found in sampled.items()})
        for convention in CONVENTIONS
    }


def _with_totals(totals: Mapping[str, Mapping[str, float]], by_group: dict[str, Sampled]) -> dict[str, Sampled]:
    summed = {}
    for name, weights in totals.items():
        parts = [(weight, by_group[group]) for group, weight in weights.items()]
        summed[name] = Sampled(
            value=sum(weight * part.value for weight, part in parts),
            values_B=np.sum([weight * part.values_B for weight, part in parts], axis=0),
            n=sum(part.n for _, part in parts),
        )
    return summed | by_group


def mean_of(groups: Sequence[str]) -> dict[str, float]:
    """The weights of an unweighted mean over groups."""
    return {group: 1 / len(groups) for group in groups}
