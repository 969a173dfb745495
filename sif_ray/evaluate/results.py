"""From the scored items of all checkpoints and arms to the numbers of results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sif_ray.evaluate.bootstrap import Estimate, mean_intervals, paired_intervals
from sif_ray.evaluate.metrics import TERMS

Item = dict[str, Any]
"""One line of items.jsonl: checkpoint, arm, sample_id, scene_id, question_type, draw, text and the `TERMS`."""

CONTROLS = ("greedy_blind", "greedy_swapped_depth")


def summarise(
    items: Sequence[Item],
    checkpoints: Sequence[str],
    chance: Mapping[str, float],
    majority: Mapping[str, float],
    num_samples: int,
    seed: int,
) -> dict[str, Any]:
    """The results without times. Every interval is a 95 % scene-level bootstrap of `num_samples` resamples.

    Item by item, "paired" compares the last of `checkpoints` with the first, and the "sight" of a checkpoint its greedy
    arm with each control.
    """
    by_arm: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        by_arm.setdefault((item["checkpoint"], item["arm"]), []).append(item)
    for arm_items in by_arm.values():
        arm_items.sort(key=lambda item: (item["sample_id"], item["draw"]))
    arms = list(dict.fromkeys(item["arm"] for item in items))

    def difference(of: tuple[str, str], baseline: tuple[str, str]) -> dict[str, Any]:
        return _difference(by_arm[of], by_arm[baseline], num_samples, seed)

    results: dict[str, Any] = {
        "num_scenes": len({item["scene_id"] for item in items}),
        "num_items": len({item["sample_id"] for item in items}),
        "chance": dict(chance),
        "majority": dict(majority),
        "checkpoints": {},
        "comparison": {},
        "paired": {},
    }
    for name in checkpoints:
        results["checkpoints"][name] = {
            "arms": {arm: _arm(by_arm[name, arm], chance, num_samples, seed) for arm in arms},
            "sight": {arm: difference((name, "greedy"), (name, arm)) for arm in CONTROLS if arm in arms},
        }
    if len(checkpoints) > 1:
        first, last = checkpoints[0], checkpoints[-1]
        results["comparison"] = {"baseline": first, "checkpoint": last}
        results["paired"] = {arm: difference((last, arm), (first, arm)) for arm in arms}
    return results


def _arm(items: Sequence[Item], chance: Mapping[str, float], num_samples: int, seed: int) -> dict[str, Any]:
    by_type: dict[str, list[Item]] = {}
    for item in items:
        by_type.setdefault(item["question_type"], []).append(item)
    return {
        "n": len(items),
        "means": _means(items, TERMS, num_samples, seed),
        "answer_by_type": {
            kind: {
                **_means(of_type, ("answer",), num_samples, seed)["answer"],
                "chance": chance[kind],
                "n": len(of_type),
            }
            for kind, of_type in sorted(by_type.items())
        },
    }


def _means(items: Sequence[Item], terms: Sequence[str], num_samples: int, seed: int) -> dict[str, dict[str, Any]]:
    scenes = [item["scene_id"] for item in items]
    estimates = mean_intervals(_values(items, terms), scenes, num_samples=num_samples, seed=seed)
    return {term: {"mean": found.mean, "ci95": _interval(found)} for term, found in zip(terms, estimates, strict=True)}


def _difference(items: Sequence[Item], baseline: Sequence[Item], num_samples: int, seed: int) -> dict[str, Any]:
    """{term: {"difference", "ci95"}} over the same items in the same order."""
    if [_key(item) for item in items] != [_key(item) for item in baseline]:
        raise ValueError("the two sides of a paired comparison hold different items")
    scenes = [item["scene_id"] for item in items]
    estimates = paired_intervals(
        _values(items, TERMS), _values(baseline, TERMS), scenes, num_samples=num_samples, seed=seed
    )
    return {
        term: {"difference": found.mean, "ci95": _interval(found)} for term, found in zip(TERMS, estimates, strict=True)
    }


def _key(item: Item) -> tuple[str, int]:
    return item["sample_id"], item["draw"]


def _values(items: Sequence[Item], terms: Sequence[str]) -> np.ndarray:
    return np.array([[item[term] for term in terms] for item in items], dtype=np.float64)


def _interval(estimate: Estimate) -> list[float]:
    return [estimate.low, estimate.high]
