from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sif_ray.method.progress import ProgressRecord
from sif_ray.method.rewards import answer_reward


def test_corrected_reads_the_epoch_before() -> None:
    record = ProgressRecord("corrected")
    record.update("a", [0.0, 0.5, 1.0, 0.5])
    assert record.previous("a") is None
    record.advance_epoch()
    assert record.epoch == 1
    assert record.previous("a") == 0.5
    record.update("a", [1.0, 1.0])
    assert record.previous("a") == 0.5  # still the snapshot
    record.advance_epoch()
    assert record.previous("a") == 1.0  # raw scores, bonus not included
    assert record.previous("b") is None


def test_published_keeps_augmented_rewards_at_once_and_no_zeros() -> None:
    record = ProgressRecord("published")
    record.update("a", [0.0, 0.0])
    assert record.previous("a") is None
    record.update("a", [0.5, 0.5])
    assert record.previous("a") == 0.5
    record.update("a", [1.0, 0.25])  # augmented: 1.5 and 0.25
    assert record.previous("a") == 0.875
    record.advance_epoch()
    record.update("a", [0.0, 0.0])
    assert record.previous("a") == 0.875


def test_corrected_keeps_zeros() -> None:
    record = ProgressRecord()
    record.update("a", [0.0, 0.0])
    record.advance_epoch()
    assert record.previous("a") == 0.0
    assert answer_reward(1.0, record.previous("a")) == 2.0


def test_a_sample_left_out_for_an_epoch_keeps_its_newest_score() -> None:
    record = ProgressRecord()
    record.update("a", [0.25])
    record.advance_epoch()
    record.advance_epoch()
    assert record.previous("a") == 0.25


@given(st.permutations([("a", 0, 0.25), ("b", 0, 0.5), ("a", 1, 0.75), ("b", 1, 1.0)]))
def test_the_order_in_which_groups_finish_changes_nothing(updates: list[tuple[str, int, float]]) -> None:
    record = ProgressRecord()
    for sample_id, epoch, score in updates:
        record.update(sample_id, [score], epoch=epoch)
    assert record.previous("a", epoch=1) == 0.25
    assert record.previous("b", epoch=1) == 0.5
    assert record.previous("a", epoch=2) == 0.75
    assert record.previous("b", epoch=0) is None


@pytest.mark.parametrize("profile", ["published", "corrected"])
def test_state_survives_json(profile: str) -> None:
    record = ProgressRecord(profile)
    for _ in range(3):
        record.update("a", [0.1, 0.7])
        record.update("b", [0.0])
        record.advance_epoch()
    restored = ProgressRecord(profile)
    restored.load_state_dict(json.loads(json.dumps(record.state_dict())))
    assert restored.state_dict() == record.state_dict()
    assert restored.epoch == 3
    assert restored.previous("a") == record.previous("a")


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"profile": "published", "epoch": 0, "means": {}},
        {"profile": "corrected"},
        {"profile": "corrected", "epoch": -1, "means": {}},
        {"profile": "corrected", "epoch": "x", "means": {}},
        {"profile": "corrected", "epoch": 0, "means": []},
        {"profile": "corrected", "epoch": 0, "means": {"a": [[0, math.nan]]}},
        {"profile": "corrected", "epoch": 0, "means": {"a": [3]}},
    ],
)
def test_foreign_or_damaged_states_are_refused(state: dict) -> None:
    record = ProgressRecord("corrected")
    record.update("a", [0.5])
    before = record.state_dict()
    with pytest.raises(ValueError, match="record"):
        record.load_state_dict(state)
    assert record.state_dict() == before


@pytest.mark.parametrize("scores", [[], [math.nan], [1.5], [None]])
def test_bad_scores_are_refused(scores: list) -> None:
    with pytest.raises(ValueError, match="score"):
        ProgressRecord().update("a", scores)
