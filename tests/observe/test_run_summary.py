"""Every goal is reached on the planted run, and missed as soon as its own number is bad."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from sif_ray.config import ConfigError
from sif_ray.observe.run_files import RunFiles, read_run
from sif_ray.observe.summary import build_summary, checks, write_summary


@pytest.fixture
def run(planted) -> RunFiles:
    """A run of its own for each test: what is changed in it stays here."""
    return read_run(planted)


def missed(run: RunFiles) -> list[str]:
    return [check.name for check in checks(run) if not check.ok]


def test_the_planted_run_reaches_every_goal(run):
    assert missed(run) == []
    assert len(checks(run)) == 13


def spoil_seconds(run: RunFiles) -> None:
    run.stage_seconds["grpo"] += 1200


def spoil_scenes(run: RunFiles) -> None:
    run.results["num_scenes"] = 299


def spoil_validity(run: RunFiles) -> None:
    arm(run, "warmup", "greedy")["means"]["format"]["mean"] = 0.9499


def spoil_types(run: RunFiles) -> None:
    for number, kind in enumerate(arm(run, "grpo", "greedy")["answer_by_type"].values()):
        kind["mean"] = kind["chance"] + (0.26 if number == 0 else 0.24)


def spoil_sight(run: RunFiles) -> None:
    blind = arm(run, "grpo", "greedy_blind")["means"]["iou_last"]["mean"]
    arm(run, "grpo", "greedy")["means"]["iou_last"]["mean"] = blind + 0.149


def spoil_reward(run: RunFiles) -> None:
    run.results["paired"]["sampled_T1.0"]["total"]["ci95"][0] = 0.0


def spoil_sampled_iou(run: RunFiles) -> None:
    run.results["paired"]["sampled_T1.0"]["iou_last"]["ci95"] = [-0.03, -0.01]


def spoil_greedy_answer(run: RunFiles) -> None:
    run.results["paired"]["greedy"]["answer"]["ci95"] = [-0.03, -0.01]


def spoil_staleness(run: RunFiles) -> None:
    run.grpo[7]["staleness_max"] = 3.0


def spoil_parity(run: RunFiles) -> None:
    run.grpo[9]["parity_mean_abs"] = 1e-3


def spoil_served(run: RunFiles) -> None:
    run.response["response"]["steps"][0]["boxes"][0]["depth"] = None


def arm(run: RunFiles, checkpoint: str, name: str) -> dict[str, Any]:
    return run.results["checkpoints"][checkpoint]["arms"][name]


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (spoil_seconds, "all stages together"),
        (spoil_scenes, "held-out scenes"),
        (spoil_validity, "format validity after warm-up, greedy"),
        (spoil_types, "question types answered 0.25 above chance, greedy"),
        (spoil_sight, "last-box IoU above the blind control, greedy"),
        (spoil_reward, "gain of total reward at T = 1, lower end of its interval"),
        (spoil_sampled_iou, "gain of last-box IoU, T = 1, upper end of its interval"),
        (spoil_greedy_answer, "gain of answer accuracy, greedy, upper end of its interval"),
        (spoil_staleness, "largest staleness"),
        (spoil_parity, "largest engine-learner difference of log-probs (mean over tokens)"),
        (spoil_served, "the served answer has steps, boxes with depth and an answer"),
    ],
)
def test_a_bad_number_misses_its_goal_and_no_other(run, spoil, name):
    spoil(run)
    assert missed(run) == [name]


def test_what_was_not_measured_is_not_reached(run):
    bare = dataclasses.replace(run, stage_seconds={}, warmup=[], grpo=[], timeline=[], results=None, response=None)
    found = checks(bare)
    assert [check.value for check in found] == [None] * len(found)
    assert not any(check.ok for check in found)


def test_the_summary_is_written_as_strict_json(planted, tmp_path):
    folder = Path(shutil.copytree(planted, tmp_path / "run"))
    summary = json.loads(write_summary(folder).read_text(), parse_constant=pytest.fail)
    assert summary == json.loads(json.dumps(build_summary(folder)))
    assert summary["grpo"]["staleness_max"] == 2.0
    assert summary["grpo"]["steps"] == 120
    assert summary["warmup"]["loss_first"] > summary["warmup"]["loss_last"]
    assert summary["dataset"]["heldout"]["scenes"] == 24
    assert summary["evaluation"]["checkpoints"]["grpo"]["answer_by_type"]["closer"].keys() >= {
        "mean",
        "chance",
        "blind",
    }


@pytest.mark.parametrize("config", [None, "", "max_rows: 5\n", "[run_dir]\n", "run_dir: 5: 5\n"])
def test_a_folder_of_something_else_is_refused(tmp_path, config):
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path))):
        build_summary(tmp_path)
