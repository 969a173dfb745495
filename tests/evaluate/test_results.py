from __future__ import annotations

import json

import pytest

from sif_ray.config import EvaluateConfig, PromptConfig
from sif_ray.evaluate.arms import arms
from sif_ray.evaluate.metrics import TERMS
from sif_ray.evaluate.results import summarise

ARMS = {"greedy": 0.5, "greedy_blind": 0.2, "greedy_swapped_depth": 0.4, "sampled_T1.0": 0.3}


def items(checkpoint: str, gain: float) -> list[dict]:
    """20 scenes of two items; scene k scores k/100 more than scene 0, so that the mean of an arm is base + 0.095."""
    return [
        {
            "checkpoint": checkpoint,
            "arm": arm,
            "sample_id": f"{scene:02}-{kind}",
            "scene_id": f"{scene:02}",
            "question_type": kind,
            "draw": draw,
            **dict.fromkeys(TERMS, base + gain + scene / 100 + (0.01 if kind == "count" else -0.01)),
        }
        for arm, base in ARMS.items()
        for scene in range(20)
        for kind in ("count", "side")
        for draw in range(2 if arm.startswith("sampled") else 1)
    ]


@pytest.fixture(scope="module")
def results():
    shuffled = sorted(items("warmup", 0.0) + items("grpo", 0.05), key=lambda item: item["sample_id"][::-1])
    chance = {"count": 1 / 3, "side": 0.5}
    return summarise(shuffled, ["warmup", "grpo"], chance, {"count": 0.4, "side": 0.6}, num_samples=500, seed=0)


def test_counts_and_means(results):
    assert (results["num_scenes"], results["num_items"]) == (20, 40)
    sampled = results["checkpoints"]["grpo"]["arms"]["sampled_T1.0"]
    assert sampled["n"] == 80
    assert set(sampled["means"]) == set(TERMS)
    total = sampled["means"]["total"]
    assert total["mean"] == pytest.approx(0.3 + 0.05 + 0.095)
    low, high = total["ci95"]
    assert low < total["mean"] < high
    assert high - low == pytest.approx(2 * 1.96 * 0.0577 / 20**0.5, rel=0.25)


def test_answers_by_type_stand_beside_their_chance(results):
    by_type = results["checkpoints"]["warmup"]["arms"]["greedy"]["answer_by_type"]
    assert by_type["count"]["mean"] == pytest.approx(0.5 + 0.095 + 0.01)
    assert (by_type["count"]["chance"], by_type["count"]["n"]) == (1 / 3, 20)
    assert by_type["side"]["mean"] == pytest.approx(0.5 + 0.095 - 0.01)


def test_pairs_remove_the_differences_between_scenes(results):
    assert results["comparison"] == {"baseline": "warmup", "checkpoint": "grpo"}
    assert set(results["paired"]) == set(ARMS)
    for found in results["paired"].values():
        assert found["answer"]["difference"] == pytest.approx(0.05)
        assert found["answer"]["ci95"] == pytest.approx([0.05, 0.05])
    sight = results["checkpoints"]["warmup"]["sight"]
    assert sight["greedy_blind"]["iou_last"]["ci95"] == pytest.approx([0.3, 0.3])
    assert sight["greedy_swapped_depth"]["depth"]["difference"] == pytest.approx(0.1)


def test_results_are_strict_json(results):
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_one_checkpoint_has_nothing_to_be_compared_with():
    alone = summarise(items("warmup", 0.0), ["warmup"], {"count": 1, "side": 1}, {}, num_samples=100, seed=0)
    assert alone["paired"] == alone["comparison"] == {}


def test_a_missing_item_is_no_silent_pair():
    lost = [item for item in items("grpo", 0.1) if item["sample_id"] != "03-side"]
    with pytest.raises(ValueError, match="different items"):
        summarise(items("w", 0) + lost, ["w", "grpo"], {"count": 1, "side": 1}, {}, num_samples=100, seed=0)


def test_arms_of_a_configuration():
    config = EvaluateConfig(temperatures=[1.0, 0.5, 0.25], draws=3)
    assert {arm.name: (arm.temperature, arm.draws) for arm in arms(config)} == {
        "greedy": (0, 1), "greedy_blind": (0, 1), "greedy_swapped_depth": (0, 1),
        "sampled_T1.0": (1, 3), "sampled_T0.5": (0.5, 3), "sampled_T0.25": (0.25, 3),
    }  # fmt: skip
    rgb_only = EvaluateConfig(temperatures=[1], prompt=PromptConfig(depth_image=False))
    assert [arm.name for arm in arms(rgb_only)] == ["greedy", "greedy_blind", "sampled_T1.0"]
