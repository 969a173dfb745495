"""Where the paths of a stage's configuration lead on a cluster.

A relative path lies below the mounted storage, or, where it is a dataset, an annotation file or a cache of depth and
there is a bucket, in the bucket. An absolute path must be on the storage already. URLs, "toy" and ids of the Hugging
Face hub stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from sif_ray.cluster.config import StorageConfig
from sif_ray.config import (
    ConfigError,
    EvaluateConfig,
    GenerateConfig,
    GrpoConfig,
    RayConfig,
    ServeConfig,
    StageConfig,
    WarmupConfig,
)

LOCAL_FOLDERS = ("runs", "data", "checkpoints")
"""`runs/base` is a folder although it could be the hub id of somebody named "runs"."""


def on_cluster(config: StageConfig, storage: StorageConfig) -> StageConfig:
    """The configuration as a job on the cluster reads it: paths on the storage, Ray joined rather than started.

    Raises `ConfigError` for a path that pods do not have.
    """
    moved: StageConfig = replace(_MOVES[type(config)](config, _Places(storage)), ray=RayConfig(address="auto"))
    return moved


class _Places:
    """Each method takes the key and its value, and gives the value on the cluster."""

    def __init__(self, storage: StorageConfig) -> None:
        self._storage = storage

    def folder(self, key: str, value: str) -> str:
        """Of a run: always on the volume, since checkpoints are written by rename."""
        if "://" in value:
            raise ConfigError(f"{key} = {value!r}: a run is written to a folder; name one below {self._storage.mount}")
        return self._path(key, value, self._storage.mount)

    def data(self, key: str, value: str) -> str:
        return value if "://" in value else self._path(key, value, self._storage.bucket or self._storage.mount)

    def model(self, key: str, value: str) -> str:
        return value if "://" in value or is_hub_id(value) else self._path(key, value, self._storage.mount)

    def _path(self, key: str, value: str, root: str) -> str:
        if value in ("", "toy"):
            return value
        path, mount = PurePosixPath(value), PurePosixPath(self._storage.mount)
        if ".." in path.parts or value.startswith("~"):
            raise ConfigError(f"{key} = {value!r} leaves the storage; name a path below {mount}, or a relative one")
        if path.is_absolute():
            if not path.is_relative_to(mount):
                raise ConfigError(
                    f"{key} = {value!r} is not on the storage, which pods have at {mount}: copy it there and name it "
                    "so, name a URL, or set storage.mount"
                )
            return value
        return f"{root.rstrip('/')}/{path}"


def is_hub_id(model: str) -> bool:
    """Whether a model is one of the Hugging Face hub, by its form: `owner/name`."""
    return re.fullmatch(r"[\w-]+/[\w.-]+", model) is not None and model.split("/")[0] not in LOCAL_FOLDERS


def _generate(config: GenerateConfig, places: _Places) -> GenerateConfig:
    teacher = config.teacher
    if teacher.kind == "vllm":
        teacher = replace(teacher, model=places.model("teacher.model", teacher.model))
    return replace(
        config,
        output=places.data("output", config.output),
        input=[places.data("input", file) for file in config.input],
        images=places.data("images", config.images),
        teacher=teacher,
        **_depth(config, places),
    )


def _training(config: WarmupConfig | GrpoConfig, places: _Places) -> WarmupConfig | GrpoConfig:
    adapter = places.model("learner.lora.adapter", config.learner.lora.adapter)
    return replace(
        config,
        data=places.data("data", config.data),
        policy=places.model("policy", config.policy),
        output=places.folder("output", config.output),
        learner=replace(config.learner, lora=replace(config.learner.lora, adapter=adapter)),
    )


def _evaluate(config: EvaluateConfig, places: _Places) -> EvaluateConfig:
    benchmarks = {
        name: replace(
            benchmark,
            **{
                key: places.data(f"benchmarks.{name}.{key}", getattr(benchmark, key))
                for key in ("annotations", "images", "answers")
            },
        )
        for name, benchmark in config.benchmarks.items()
    }
    checkpoints = {name: places.model(f"checkpoints.{name}", folder) for name, folder in config.checkpoints.items()}
    return replace(
        config,
        data=places.data("data", config.data),
        output=places.folder("output", config.output),
        benchmarks=benchmarks,
        checkpoints=checkpoints,
        **_depth(config, places),
    )


def _serve(config: ServeConfig, places: _Places) -> ServeConfig:
    if config.api_keys_file:
        raise ConfigError(
            f"api_keys_file = {config.api_keys_file!r}: keys are not kept on the storage; set api_keys_env to a "
            "variable that the cluster file has under secrets"
        )
    adapters = {name: places.model(f"adapters.{name}", folder) for name, folder in config.adapters.items()}
    return replace(
        config,
        policy=places.model("policy", config.policy),
        adapters=adapters,
        host="0.0.0.0",  # of the pod; who may reach it is the NetworkPolicy's
        port=SERVE_PORT,
        **_depth(config, places),
    )


SERVE_PORT = 8000  # of a RayService's pods


def _depth(config: GenerateConfig | EvaluateConfig | ServeConfig, places: _Places) -> dict[str, str]:
    return {
        "depth_model": places.model("depth_model", config.depth_model),
        "depth_cache": places.data("depth_cache", config.depth_cache),
    }


_MOVES: dict[type[Any], Callable[[Any, _Places], Any]] = {
    GenerateConfig: _generate,
    WarmupConfig: _training,
    GrpoConfig: _training,
    EvaluateConfig: _evaluate,
    ServeConfig: _serve,
}
