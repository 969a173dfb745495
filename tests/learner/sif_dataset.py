"""A finished dataset folder of given rows, in shards."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

from sif_ray.datagen.dataset import ACCEPTED, FORMAT, MANIFEST
from sif_ray.datagen.drafts import Draft, drafts_to_table
from sif_ray.records import Sample


def write_dataset(folder: Path, samples: list[Sample], rows_per_shard: int) -> str:
    """Shards of `rows_per_shard` rows in the order given, then one without a row."""
    (folder / ACCEPTED).mkdir(parents=True)
    starts = [*range(0, len(samples), rows_per_shard), len(samples)]
    for number, start in enumerate(starts):
        drafts = [Draft(sample) for sample in samples[start : start + rows_per_shard]]
        pq.write_table(drafts_to_table(drafts), folder / ACCEPTED / f"{number:05d}.parquet")
    splits = {name: {"accepted": count} for name, count in Counter(sample.split for sample in samples).items()}
    manifest = {"format": FORMAT, "counts": {"splits": splits}, "ids": [sample.sample_id for sample in samples]}
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return str(folder)
