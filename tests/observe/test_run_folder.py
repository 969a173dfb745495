"""The run folder says with what it was run, and a configuration read back is the one that was written."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy
import pytest

from sif_ray import config as configuration
from sif_ray.config import ConfigError
from sif_ray.observe.run_folder import RunFolder, kept_to_itself, write_json


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


def test_a_folder_is_kept_to_one_process_until_it_ends_however_it_ends(tmp_path):
    script = f"""
import time
from pathlib import Path
from sif_ray.observe.run_folder import kept_to_itself
with kept_to_itself(Path({str(tmp_path)!r})):
    print("has it", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "has it\n"
            with pytest.raises(ConfigError, match="another run is at work in it"), kept_to_itself(tmp_path):
                pass
        finally:
            other.kill()
    with kept_to_itself(tmp_path):
        pass
