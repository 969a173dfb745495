"""Every tracker by its real client: what was logged is read back from its own store."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from sif_ray.config import ConfigError, load
from sif_ray.observe import trackers
from sif_ray.observe.metrics import MetricsLog, read_metrics

NOT_INSTALLED = "the extra `trackers` is not installed"
STEPS = [(1, {"reward/total": 1.5, "kl": 0.25}), (2, {"reward/total": 1.75, "kl": float("nan")})]


def log_steps(folder: Path, name: str, steps=STEPS) -> None:
    """A run of its own that logs `steps` to one tracker."""
    opened = trackers.open_trackers([name], folder, {"group_size": 4})
    with MetricsLog(folder / "metrics.jsonl", opened) as log:
        for step, values in steps:
            log.log(step, values)


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_steps(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tensors("reward/total")
    assert [(event.step, event.tensor_proto.float_val[0]) for event in events] == [(1, 1.5), (2, 1.75)]


def test_mlflow_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason=NOT_INSTALLED)
    pytest.importorskip("alembic", reason=NOT_INSTALLED)
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    log_steps(tmp_path, "mlflow")
    log_steps(tmp_path, "mlflow", [(3, {"reward/total": 2.0})])
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(trackers.PROJECT)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.params == {"group_size": "4"}
    history = client.get_metric_history(run.info.run_id, "reward/total")
    assert [(entry.step, entry.value) for entry in history] == [(1, 1.5), (2, 1.75), (3, 2.0)]
    assert [entry.step for entry in client.get_metric_history(run.info.run_id, "kl")] == [1]


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason=NOT_INSTALLED)
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    log_steps(tmp_path, "wandb", [*STEPS, (1, {"reward/total": 1.25})])  # a resumed run logs a step again
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    history, config = [], {}
    for data in leveldb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            history.append((int(items["step"]), float(items["reward/total"])))
    assert history == [(1, 1.5), (2, 1.75), (1, 1.25)]
    assert config["group_size"] == 4


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """Records of a W&B transaction log: a LevelDB log (blocks of 32 KiB, fragments with a header of 7 bytes) whose
    first block has 7 bytes in front."""
    at, parts = 7, []
    while at < len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)  # after the checksum
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            yield b"".join(parts)
            parts = []


def test_a_missing_package_is_refused_with_the_way_out():
    """In a process of its own that cannot see the package, installed or not."""
    program = """
        import sys
        sys.modules |= {"wandb": None}
        import importlib.util
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name: None if name == "wandb" else find(name)
        from sif_ray.observe.trackers import check_trackers
        check_trackers(["tensorboard", "wandb"])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "wandb needs the package wandb" in done.stderr and "pip install" in done.stderr


def test_a_tracker_that_does_not_open_is_a_wrong_request(tmp_path):
    (tmp_path / "tensorboard").write_text("a file where the folder of events should be")
    with pytest.raises(ConfigError, match=r"tensorboard does not open"):
        trackers.open_trackers(["tensorboard"], tmp_path, {})


@pytest.mark.parametrize("names", ["[excel]", "[tensorboard,tensorboard]"])
def test_unknown_and_repeated_trackers_are_refused(names):
    with pytest.raises(ConfigError, match=r"trackers = .*prometheus, tensorboard, wandb, mlflow"):
        load("grpo", None, [f"trackers={names}"])


def test_every_tracker_of_the_configuration_can_be_opened():
    from sif_ray.config import TRACKERS

    assert set(TRACKERS) == set(trackers._OPEN)


class Unplugged:
    """A tracker whose server goes away after one step."""

    name = "unplugged"

    def __init__(self) -> None:
        self.got: list[int] = []
        self.ended: list[bool] = []

    def log(self, step, values) -> None:
        if step in (2, 3):
            raise ConnectionError("the server is gone")
        self.got.append(step)

    def close(self, ok) -> None:
        self.ended.append(ok)


def test_a_tracker_that_fails_in_mid_run_costs_only_its_own_lines(tmp_path, caplog):
    tracker = Unplugged()
    with MetricsLog(tmp_path / "metrics.jsonl", [tracker]) as log:
        for step in range(1, 5):
            log.log(step, {"kl": 0.1 * step})
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert tracker.got == [1, 4] and tracker.ended == [True]
    told = [record.getMessage() for record in caplog.records]
    assert told == ["tracker unplugged failed; the run goes on without it", "tracker unplugged lost 2 calls"]


def test_a_tracker_hears_that_the_run_failed(tmp_path):
    tracker = Unplugged()
    with pytest.raises(ValueError), MetricsLog(tmp_path / "metrics.jsonl", [tracker]):
        raise ValueError
    assert tracker.ended == [False]
