"""The Ray Data pipeline of one dataset:

    keys ─► load_photos (tasks) ─► EstimateDepth (actor pool) ─► make_rows + write Parquet (tasks)

A photograph's depth is computed once, whatever the number of its questions. Images travel encoded. One block of keys
becomes one shard. Ray runs neighbouring steps as one where it can: without a GPU the actors load their photographs too.
"""

from __future__ import annotations

import itertools
import logging
import math
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa

from sif_ray.config import GenerateConfig
from sif_ray.datagen.dataset import ACCEPTED, REJECTED, ROW_SCHEMA
from sif_ray.datagen.photos import PhotoError, decode, photos_from_table, photos_to_table
from sif_ray.datagen.rows import photo_rows
from sif_ray.datagen.sources import PhotoKey, Source
from sif_ray.records import sample_to_row

log = logging.getLogger(__name__)

FOLDER_COLUMN = "folder"
MIN_BLOCKS = 8  # so that the operators overlap in small runs too


def load_photos(keys: pa.Table, source: Source) -> pa.Table:
    """The source's photographs of a batch of keys."""
    return photos_to_table([source.load(PhotoKey(**key)) for key in keys.to_pylist()])


class EstimateDepth:
    """Decodes a batch of photographs, refuses the unusable ones, and gives depth to those that came without."""

    def __init__(self, model: str, threads: int) -> None:
        import torch

        from sif_ray.depth.estimator import DepthEstimator

        torch.set_num_threads(threads)
        self._estimator = DepthEstimator(model)

    def __call__(self, table: pa.Table) -> pa.Table:
        from sif_ray.depth.encoding import depth_png

        photos = photos_from_table(table)
        estimated, images = [], []
        for index, photo in enumerate(photos):
            try:
                image = decode(photo.image)
            except PhotoError as error:
                log.warning("%s: %s", photo.scene_id, error)
                photos[index] = replace(photo, error=error.reason)
                continue
            photos[index] = replace(photo, width=image.width, height=image.height)
            if not photo.depth_image:
                estimated.append(index)
                images.append(image)
        source = f"estimated:{self._estimator.name}"
        for index, depth_rel in zip(estimated, self._estimator.estimate(images), strict=True):
            photos[index] = replace(photos[index], depth_image=depth_png(depth_rel), depth_source=source)
        return photos_to_table(photos)


def make_rows(table: pa.Table, config: GenerateConfig) -> pa.Table:
    """Dataset rows, accepted and refused, of a batch of photographs with depth."""
    rows = [row for photo in photos_from_table(table) for row in photo_rows(photo, config)]
    columns = [
        {
            **sample_to_row(row.sample),
            "reasons": list(row.reasons),
            FOLDER_COLUMN: REJECTED if row.reasons else ACCEPTED,
        }
        for row in rows
    ]
    return pa.Table.from_pylist(columns, schema=ROW_SCHEMA.append(pa.field(FOLDER_COLUMN, pa.string())))


def write_rows(source: Source, keys: list[PhotoKey], config: GenerateConfig, folder: Path) -> None:
    """Run the pipeline in the Ray session that is up; shards land in the folders `data` and `rejected` of `folder`."""
    import ray

    dataset = (
        ray.data.from_arrow(_blocks(keys, config.rows_per_shard))
        .map_batches(load_photos, batch_format="pyarrow", fn_kwargs={"source": source})
        .map_batches(
            EstimateDepth,
            batch_format="pyarrow",
            batch_size=config.depth_batch_size,
            compute=ray.data.ActorPoolStrategy(min_size=config.depth_actors_min, max_size=config.depth_actors_max),
            fn_constructor_kwargs={"model": config.depth_model, "threads": max(1, int(config.depth_num_cpus))},
            **_resources(config),
        )
        .map_batches(make_rows, batch_format="pyarrow", fn_kwargs={"config": config})
    )
    dataset.write_parquet(str(folder), partition_cols=[FOLDER_COLUMN])
    for kind in (ACCEPTED, REJECTED):
        written = folder / f"{FOLDER_COLUMN}={kind}"
        if written.exists():
            written.rename(folder / kind)


def _resources(config: GenerateConfig) -> dict[str, float]:
    if config.depth_num_gpus > 0:
        return {"num_gpus": config.depth_num_gpus}  # Ray advises against asking for both
    return {"num_cpus": config.depth_num_cpus}


def _blocks(keys: list[PhotoKey], rows_per_shard: int) -> list[pa.Table]:
    """Keys in blocks of about `rows_per_shard` rows, but in at least `MIN_BLOCKS` blocks."""
    num_rows = sum(key.num_rows for key in keys)
    num_blocks = min(len(keys), max(MIN_BLOCKS, math.ceil(num_rows / rows_per_shard)))
    bounds = [len(keys) * block // num_blocks for block in range(num_blocks + 1)]
    return [
        pa.Table.from_pylist([asdict(key) for key in keys[start:stop]]) for start, stop in itertools.pairwise(bounds)
    ]
