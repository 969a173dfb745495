from __future__ import annotations

import math

import numpy as np
import pytest

from sif_ray.evaluate.bootstrap import mean_intervals, paired_intervals


def brute_force(values, scene_ids, num_samples, seed):
    """Resample scene by scene, collect the items, take the mean: the definition, in a loop."""
    rng = np.random.default_rng(seed)
    items = list(zip(values, scene_ids, strict=True))
    groups = {scene: [value for value, own in items if own == scene] for scene in set(scene_ids)}
    names = sorted(groups)
    means = [
        np.mean([value for index in rng.integers(len(names), size=len(names)) for value in groups[names[index]]])
        for _ in range(num_samples)
    ]
    return np.quantile(means, [0.025, 0.975])


def test_interval_of_independent_items_is_the_normal_one():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=(2000, 1))
    [estimate] = mean_intervals(values, [str(i) for i in range(2000)], num_samples=4000, seed=0)
    half = 1.96 * values.std() / math.sqrt(2000)
    assert estimate.mean == pytest.approx(values.mean())
    assert (estimate.low, estimate.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.06 * half)


def test_repeated_items_of_a_scene_do_not_narrow_the_interval():
    values = np.random.default_rng(2).random((100, 1))
    scenes = [str(i) for i in range(100)]
    [once] = mean_intervals(values, scenes, num_samples=2000, seed=5)
    [often] = mean_intervals(np.repeat(values, 7, axis=0), list(np.repeat(scenes, 7)), num_samples=2000, seed=5)
    assert (often.low, often.high) == pytest.approx((once.low, once.high))


def test_scenes_of_unequal_size_agree_with_the_definition():
    rng = np.random.default_rng(3)
    scene_ids = [f"scene-{i}" for i in range(40) for _ in range(rng.integers(1, 6))]
    values = rng.normal(size=len(scene_ids)) + np.array([scene_effect(s) for s in scene_ids])
    [estimate] = mean_intervals(values[:, None], scene_ids, num_samples=6000, seed=1)
    low, high = brute_force(values, scene_ids, 6000, 2)
    width = high - low
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.05 * width)


def scene_effect(scene_id: str) -> float:
    """A scene's own effect, so that items of a scene are correlated."""
    return math.sin(int(scene_id.split("-")[1]))


def test_pairing_removes_what_both_sides_share():
    rng = np.random.default_rng(4)
    baseline = rng.normal(0, 5, size=(300, 1))
    values = baseline + 0.1 + rng.normal(0, 0.01, size=(300, 1))
    [estimate] = paired_intervals(values, baseline, [str(i) for i in range(300)], num_samples=1000, seed=0)
    assert 0.09 < estimate.low < 0.1 < estimate.high < 0.11


def test_same_seed_same_numbers_whatever_stands_beside():
    values = np.random.default_rng(6).random((50, 3))
    scenes = [str(i // 2) for i in range(50)]
    together = mean_intervals(values, scenes, num_samples=500, seed=9)
    assert together == mean_intervals(values, scenes, num_samples=500, seed=9)
    [alone] = mean_intervals(values[:, 1:2], scenes, num_samples=500, seed=9)
    assert (together[1].low, together[1].high) == pytest.approx((alone.low, alone.high))


def test_coverage_is_near_95_percent():
    rng = np.random.default_rng(8)
    scenes = [str(i // 3) for i in range(180)]
    hits = 0
    for trial in range(300):
        effects = np.repeat(rng.normal(0, 1, 60), 3) + rng.normal(0, 1, 180)
        [estimate] = mean_intervals(effects[:, None], scenes, num_samples=400, seed=trial)
        hits += estimate.low <= 0 <= estimate.high
    assert 0.90 <= hits / 300 <= 0.985


@pytest.mark.parametrize(
    ("values", "scenes"), [(np.zeros((0, 1)), []), (np.zeros((2, 1)), ["a"]), ([[np.nan]], ["a"]), ([1.0], ["a"])]
)
def test_refuses_what_has_no_mean(values, scenes):
    with pytest.raises(ValueError, match=r"item|scene id|finite"):
        mean_intervals(values, scenes, num_samples=100, seed=0)


def test_refuses_pairs_of_different_items():
    with pytest.raises(ValueError, match="same items"):
        paired_intervals(np.zeros((2, 1)), np.zeros((3, 1)), ["a", "b"], num_samples=100, seed=0)
