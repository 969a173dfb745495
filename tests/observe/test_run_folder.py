"""The run folder says with what it was run, and a configuration read back is the one that was written."""

from __future__ import annotations

import json

import numpy
import pytest

from sif_ray import config as configuration
from sif_ray.observe.run_folder import RunFolder, write_json


def test_configuration_and_environment_are_written(tmp_path):
    config = configuration.load("grpo", None, ["group_size=4"])
    folder = RunFolder(tmp_path / "runs" / "a", config)
    assert configuration.load("grpo", str(folder.path / "config.yaml")) == config
    environment = json.loads((folder.path / "environment.json").read_text())
    assert environment["packages"]["numpy"] == numpy.__version__
    assert environment["num_cpus"] >= 1


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write_json(tmp_path / "summary.json", {"loss": 1.0})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text()) == {"loss": 1.0}


def test_metrics_and_timeline_land_in_the_folder(tmp_path):
    folder = RunFolder(tmp_path)
    with folder.metrics() as metrics:
        metrics.log(1, {"loss": 1.0})
    folder.timeline().close()
    assert {"metrics.jsonl", "timeline.jsonl"} <= {path.name for path in tmp_path.iterdir()}
