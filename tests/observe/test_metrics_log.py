"""Metrics survive a killed writer, a resumed run and numbers that are not finite."""

from __future__ import annotations

import json
import math

import pytest

from sif_ray.observe.metrics import MetricsLog, read_metrics


def test_what_is_logged_is_read(tmp_path):
    with MetricsLog(tmp_path / "run" / "metrics.jsonl") as log:
        log.log(1, {"loss": 2.0})
        log.log(2, {"loss": 1.0, "reward/total": 0.5})
    first, second = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert (first["step"], first["loss"]) == (1, 2.0)
    assert (second["step"], second["reward/total"]) == (2, 0.5)
    assert first["time_s"] <= second["time_s"]


def test_a_half_written_line_is_cut_off_before_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.log(1, {"loss": 2.0})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert [record["step"] for record in read_metrics(path)] == [1]
    with MetricsLog(path) as log:
        log.log(2, {"loss": 1.0})
    assert [record["loss"] for record in read_metrics(path)] == [2.0, 1.0]


def test_of_a_repeated_step_the_later_line_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for losses in ({1: 3.0, 2: 2.0}, {2: 1.5, 3: 1.0}):
        with MetricsLog(path) as log:
            for step, loss in losses.items():
                log.log(step, {"loss": loss})
    assert [(record["step"], record["loss"]) for record in read_metrics(path)] == [(1, 3.0), (2, 1.5), (3, 1.0)]


def test_lines_are_strict_json_and_nan_comes_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.log(1, {"loss": math.nan, "kl": math.inf})
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["loss"] is None
    assert math.isnan(read_metrics(path)[0]["loss"])


def test_reserved_names_are_refused(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log, pytest.raises(ValueError, match="time_s"):
        log.log(1, {"time_s": 1.0})
