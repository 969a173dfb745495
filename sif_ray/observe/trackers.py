"""TensorBoard, W&B, MLflow and Prometheus behind one interface (`sif_ray.observe.metrics.Tracker`).

Each is a thin adapter over the real client and takes its account, server and project from the client's own environment
variables: `WANDB_API_KEY`, `WANDB_MODE=offline`, `WANDB_PROJECT`, `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`, ...
A resumed run goes on in the same W&B and MLflow run: `trackers.json` in the run folder remembers which.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sif_ray.config import ConfigError
from sif_ray.observe.metrics import Tracker
from sif_ray.observe.prometheus import Prometheus
from sif_ray.observe.run_folder import write_json

log = logging.getLogger(__name__)

PROJECT = "sif_ray"
IDS_FILE = "trackers.json"
PACKAGES = {"wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}  # of the extra `trackers`


def check_trackers(names: Sequence[str]) -> None:
    """Raise `ConfigError` if a tracker's package is missing. Imports and starts nothing."""
    for name in names:
        missing = [package for package in PACKAGES.get(name, ()) if importlib.util.find_spec(package) is None]
        if missing:
            raise ConfigError(
                f"trackers = {list(names)}: {name} needs the package {', '.join(missing)}; "
                "pip install -c constraints.txt -e '.[trackers]', or leave it out"
            )


def open_trackers(names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> list[Tracker]:
    """The trackers of the run in `folder`, told of `settings` (values that differ from the defaults).

    Raises `ConfigError` where one does not open, e.g. for want of an account or a server.
    """
    check_trackers(names)
    opened: list[Tracker] = []
    for name in names:
        try:
            opened.append(_OPEN[name](folder, settings))
        except Exception as error:  # each client has errors of its own
            for tracker in opened:
                tracker.close(ok=False)
            raise ConfigError(
                f"trackers = {list(names)}: {name} does not open ({error}); see its environment variables in "
                f"sif_ray/observe/trackers.py, or leave it out"
            ) from error
    return opened


def run_name(folder: Path) -> str:
    """What a run is called in a tracker: the last two parts of its folder."""
    return "/".join(folder.parts[-2:])


class TensorBoard:
    """Event files in `tensorboard/`."""

    name = "tensorboard"

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        from tensorboard.summary import Writer

        self._writer = Writer(str(folder / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, ok: bool) -> None:
        self._writer.close()


class WandB:
    """One W&B run. Steps are a value of their own, as W&B refuses to go back to an earlier one after a resume."""

    name = "wandb"

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run_name(folder),
            dir=str(folder),
            id=_known_id(folder, self.name),
            resume="allow",
            config=dict(settings),
            settings=wandb.Settings(console="off"),  # the run's own progress bar stays whole
        )
        run.define_metric("*", step_metric="step")
        _remember_id(folder, self.name, run.id)
        self._run = run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self, ok: bool) -> None:
        import wandb

        self._run.finish(exit_code=0 if ok else 1)
        wandb.teardown()  # ends W&B's own process


class MLflow:
    """One MLflow run, in `mlflow.db` of the run folder where no server is named."""

    name = "mlflow"

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}"))
        known = _known_id(folder, self.name)
        if known is not None:
            self._client.update_run(known, status="RUNNING")
            self._run_id = known
            return
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(title)
        experiment_id = self._client.create_experiment(title) if experiment is None else experiment.experiment_id
        self._run_id = self._client.create_run(experiment_id, run_name=run_name(folder)).info.run_id
        self._client.log_batch(self._run_id, params=[Param(key, str(value)) for key, value in settings.items()])
        _remember_id(folder, self.name, self._run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now_ms = int(1000 * time.time())
        finite = [(name, value) for name, value in values.items() if math.isfinite(value)]
        self._client.log_batch(self._run_id, [self._metric(name, value, now_ms, step) for name, value in finite])

    def close(self, ok: bool) -> None:
        self._client.set_terminated(self._run_id, status="FINISHED" if ok else "FAILED")


_OPEN: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "prometheus": lambda folder, settings: Prometheus(run_name(folder)),
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


def _known_id(folder: Path, tracker: str) -> str | None:
    return _ids(folder).get(tracker)


def _remember_id(folder: Path, tracker: str, run_id: str) -> None:
    write_json(folder / IDS_FILE, _ids(folder) | {tracker: run_id})


def _ids(folder: Path) -> dict[str, str]:
    path = folder / IDS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
