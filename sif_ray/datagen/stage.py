"""The stage `generate`: configuration in, dataset folder out."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sif_ray.config import ConfigError, GenerateConfig
from sif_ray.datagen import dataset, pipeline
from sif_ray.datagen.sources import make_source
from sif_ray.observe.run_folder import environment, write_json
from sif_ray.runtime import ray_session

log = logging.getLogger(__name__)

_CONTENT_KEYS = (
    "source",
    "splits",
    "questions_per_scene",
    "seed",
    "profile",
    "decimals",
    "depth_model",
    "teacher",
    "rows_per_shard",
)
"""What the rows depend on; the other keys say where and how fast they are made."""


def run(config: GenerateConfig) -> None:
    """Generate the dataset of `config` into `config.output`, unless it is there already.

    Raises `DatasetError` if the folder holds something else, and `RuntimeError` if rows were lost, doubled or all
    refused.
    """
    if dataset.is_finished(config.output, config_hash(config)):
        counts = dataset.read_manifest(config.output)["counts"]
        log.info("generate: %s is finished with this configuration, %s", config.output, _told(counts))
        return
    source = make_source(config)
    keys = source.list_keys()
    num_rows = sum(photo.num_rows for photo in keys)
    log.info("generate: %d photographs, %d questions from %s", len(keys), num_rows, config.source)
    started_s = time.time()
    with dataset.whole_or_not_at_all(config.output) as folder:
        with ray_session(config.ray):
            _check_cpus(config)
            pipeline.write_rows(source, keys, config, folder)
        counts = finish(folder, config, num_rows, started_s)
    seconds = time.time() - started_s
    log.info("generate: %s in %.0f s, %.1f rows/s -> %s", _told(counts), seconds, num_rows / seconds, config.output)
    for reason, count in sorted(counts["reasons"].items()):
        log.warning("generate: %d rows refused: %s", count, reason)


def finish(folder: Path, config: GenerateConfig, num_rows: int, started_s: float) -> dict[str, Any]:
    """Make a folder of written shards a dataset, if exactly `num_rows` rows are there; returns the counts."""
    shards = dataset.order_shards(folder)
    counts, sample_ids = dataset.count_rows(folder)
    _check_totals(num_rows, counts, sample_ids)
    dataset.write_published(folder)
    manifest = {
        "format": dataset.FORMAT,
        "config": asdict(config),
        "config_hash": config_hash(config),
        "counts": counts,
        "shards": shards,
        "seconds": round(time.time() - started_s, 1),
        "environment": environment(),
    }
    write_json(folder / dataset.MANIFEST, manifest)
    return counts


def config_hash(config: GenerateConfig) -> str:
    """Short hash of everything that the rows depend on, the weights of a local depth model included."""
    content: dict[str, Any] = {name: getattr(config, name) for name in _CONTENT_KEYS}
    content["splits"] = config.scenes_per_split if config.source == "toyworld" else {}
    content["depth_weights"] = _weights_hash(config.depth_model)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _weights_hash(model: str) -> str:
    from sif_ray.depth.checkpoint import resolve_model

    digest = hashlib.sha256()
    for path in sorted(Path(resolve_model(model)).glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _check_cpus(config: GenerateConfig) -> None:
    """A pool that holds every CPU starves the tasks that feed it, and the pipeline would stand still."""
    import ray

    available = ray.cluster_resources().get("CPU", 0)
    needed = (0 if config.depth_num_gpus else config.depth_actors_min * config.depth_num_cpus) + 1
    if config.ray.address == "local" and available < needed:
        raise ConfigError(
            f"ray.num_cpus ({available:g}) is below {needed:g} = depth_actors_min * depth_num_cpus + 1 for the other "
            "tasks; raise it or lower depth_actors_min or depth_num_cpus"
        )


def _check_totals(expected: int, counts: dict[str, Any], sample_ids: list[str]) -> None:
    found = counts["accepted"] + counts["rejected"]
    if found != expected or len(set(sample_ids)) != found:
        raise RuntimeError(
            f"{found} rows with {len(set(sample_ids))} ids came out of {expected} questions; nothing was written"
        )
    if counts["accepted"] == 0:
        raise RuntimeError(f"all {found} rows were refused: {counts['reasons']}; nothing was written")


def _told(counts: dict[str, Any]) -> str:
    return f"{counts['accepted']} rows of {counts['scenes']} photographs, {counts['rejected']} refused"
