"""Differences of two policies, and the measures that they are differences of."""

from __future__ import annotations

import numpy as np
import pytest
from benchmark_files import output, replies, vstar
from scipy.stats import binom

from sif_ray.evaluate.benchmarks import BENCHMARKS
from sif_ray.evaluate.bootstrap import mean_intervals, ratio_resamples
from sif_ray.evaluate.comparison import compare, mcnemar
from sif_ray.evaluate.measure import Point, Ratios, mean_of, point, pooled, sample_all


def accuracies(right: list[int]) -> Ratios:
    return pooled("accuracy", (("x", point(str(i), value, value)) for i, value in enumerate(right)))


@pytest.mark.parametrize(("only_ours", "only_baseline"), [(0, 0), (1, 0), (5, 1), (3, 9), (10, 10)])
def test_mcnemar_is_the_exact_binomial_test(only_ours, only_baseline):
    ours = [1] * only_ours + [0] * only_baseline + [1, 1, 0]
    theirs = [0] * only_ours + [1] * only_baseline + [1, 1, 0]
    found = mcnemar(accuracies(ours), accuracies(theirs), "strict")
    differing, fewer = only_ours + only_baseline, min(only_ours, only_baseline)
    p = min(1.0, 2 * binom.cdf(fewer, differing, 0.5))
    assert found == {"only_ours": only_ours, "only_baseline": only_baseline, "p": pytest.approx(p)}


def test_mcnemar_takes_the_pairs_that_both_have_a_verdict_on():
    def judged(values: list[float | None]) -> Ratios:
        ratios = [(0.0, 0.0) if value is None else (value, 1.0) for value in values]
        return pooled("score", [("x", Point(str(i), ratio, ratio)) for i, ratio in enumerate(ratios)])

    ours, theirs = judged([None, 1, 1, 0, 1, 0]), judged([1, None, 0, 0, 1, 1])
    found = mcnemar(ours, theirs, "strict")
    assert found == {"only_ours": 1, "only_baseline": 1, "p": pytest.approx(1.0)}
    assert mcnemar(judged([None, 1]), judged([1, None]), "strict") == {"only_ours": 0, "only_baseline": 0, "p": 1.0}


def test_mcnemar_says_nothing_about_shares():
    halves = pooled("score", [("x", point("a", 0.5, 1))])
    assert mcnemar(halves, halves, "strict") is None
    assert mcnemar(halves, halves, "published") == {"only_ours": 0, "only_baseline": 0, "p": 1.0}


def test_a_paired_difference_is_narrower_than_two_apart(tmp_path):
    rng = np.random.default_rng(0)
    labels = [("direct_attributes", "A")] * 300
    path = vstar(tmp_path / "q.jsonl", labels)
    theirs = rng.random(300) < 0.5
    ours = theirs | (rng.random(300) < 0.1)
    sides = [
        replies(BENCHMARKS["vstar"], path, [output("A" if right else "B") for right in side]) for side in (ours, theirs)
    ]
    found = compare(BENCHMARKS["vstar"], *sides, num_samples=2000, seed=0)["strict"]["accuracy"]["overall"]
    assert found["difference"] == pytest.approx(ours.mean() - theirs.mean())
    low, high = found["ci95"]
    half = 1.96 * (ours.astype(int) - theirs).std() / np.sqrt(300)
    assert (low, high) == pytest.approx((found["difference"] - half, found["difference"] + half), abs=0.15 * half)


def test_different_items_cannot_be_compared(tmp_path):
    path = vstar(tmp_path / "q.jsonl", [("direct_attributes", "A")] * 2)
    found = replies(BENCHMARKS["vstar"], path, ["", ""])
    with pytest.raises(ValueError, match="different items"):
        compare(BENCHMARKS["vstar"], found, found[::-1], num_samples=10, seed=0)


def test_ratios_of_ones_are_means():
    rng = np.random.default_rng(1)
    values, scenes = rng.random(200), [str(i // 3) for i in range(200)]
    columns = values[:, None], np.ones((200, 1))
    [value], resamples_B1 = ratio_resamples(*columns, scenes, num_samples=3000, seed=4)
    [estimate] = mean_intervals(values[:, None], scenes, num_samples=3000, seed=4)
    assert value == pytest.approx(estimate.mean)
    assert np.quantile(resamples_B1[:, 0], [0.025, 0.975]) == pytest.approx([estimate.low, estimate.high])


def test_draws_in_parts_are_the_draws_at_once(monkeypatch):
    columns, scenes = np.random.default_rng(2).random((2, 50, 1)) + 0.1, [str(i) for i in range(50)]
    _, whole_B1 = ratio_resamples(*columns, scenes, num_samples=100, seed=3)
    monkeypatch.setattr("sif_ray.evaluate.bootstrap._NUMBERS_HELD", 170)
    _, parts_B1 = ratio_resamples(*columns, scenes, num_samples=100, seed=3)
    assert parts_B1 == pytest.approx(whole_B1, rel=1e-12)


def test_a_mean_over_groups_resamples_each_by_itself():
    """Two groups of equal size and opposite values: drawn alike, their mean would not vary at all."""
    first = [point(str(i), i % 2, i % 2) for i in range(100)]
    second = [point(str(i), 1 - i % 2, 1 - i % 2) for i in range(100)]
    measure = Ratios("accuracy", {"a": first, "b": second}, {"overall": mean_of(["a", "b"])})
    low, high = sample_all(measure, 2000, 0)["strict"]["overall"].interval()
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.5 / np.sqrt(200), 0.5 + 1.96 * 0.5 / np.sqrt(200)), abs=0.01)


def test_what_does_not_count_has_no_score():
    measure = Ratios("accuracy", {"x": [Point("a", (0.0, 0.0), (1.0, 1.0))]})
    assert sample_all(measure, 20, 0)["strict"]["x"].summary() == {"score": None, "ci95": None, "n": 0}
    assert sample_all(measure, 20, 0)["published"]["x"].summary() == {"score": 1.0, "ci95": [1.0, 1.0], "n": 1}
