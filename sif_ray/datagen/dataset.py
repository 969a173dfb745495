"""The dataset folder, on a disk or in an object store, as those who use it read it.

manifest.json          written last: the dataset is finished. Configuration and its hash, counts, seconds, versions,
                       hash of every shard
plan.json              what was asked for, and into how many shards it is cut (sif_ray.datagen.index)
index/*.parquet        what every shard is made of
data/*.parquet         accepted rows, columns of `DRAFT_SCHEMA` (sif_ray.datagen.shards)
rejected/*.parquet     refused rows with their reasons, same columns
subsets.json           named lists of accepted rows; with it the released layout (sif_ray.datagen.published)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads

from sif_ray.config import ConfigError
from sif_ray.datagen.drafts import DRAFT_SCHEMA, SHARDS
from sif_ray.records import SAMPLE_SCHEMA, Sample, sample_from_row
from sif_ray.storage import Folder

MANIFEST, PLAN, SUBSETS = "manifest.json", "plan.json", "subsets.json"
INDEX, ACCEPTED, REJECTED = "index", "data", "rejected"
FORMAT = 2

Place = str | Path | Folder
"""A path, a URL or an opened folder."""


class DatasetError(ConfigError):
    """A folder that is no dataset, another dataset than asked for, or one without the rows asked for."""


def as_folder(place: Place) -> Folder:
    """The folder of a dataset. Raises `ConfigError` where it cannot be reached."""
    return place if isinstance(place, Folder) else Folder.open(place, "data")


def read_manifest(place: Place) -> dict[str, Any]:
    """The manifest of a finished dataset. Raises `DatasetError` where there is none."""
    folder = as_folder(place)
    if not folder.exists(MANIFEST):
        how = (
            "finish it with the sif-ray generate that began it"
            if folder.exists(PLAN)
            else "make one with sif-ray generate"
        )
        raise DatasetError(f"{folder.url}: no finished dataset ({MANIFEST} is missing); {how}")
    with damage_named(folder):
        manifest: dict[str, Any] = folder.read_json(MANIFEST)
        found = manifest.get("format")
    if found != FORMAT:
        raise DatasetError(f"{folder.url}: format {found!r}; this version reads {FORMAT}; generate it again")
    return manifest


def read_samples(place: Place, split: str | None = None) -> list[Sample]:
    """The accepted rows of a split or subset (None = all), by split and sample id: the rows of a scene are neighbours.

    Raises `DatasetError` for a folder without manifest, a split that it does not have, missing or surplus rows, and
    files that are damaged.
    """
    folder = as_folder(place)
    with damage_named(folder):
        return _read_samples(folder, split)


def _read_samples(folder: Folder, split: str | None) -> list[Sample]:
    counts = read_manifest(folder)["counts"]["splits"]
    subsets = folder.read_json(SUBSETS) if folder.exists(SUBSETS) else {}
    if split is None or split in counts:
        wanted = None if split is None else pads.field("split") == split
        expected = sum(count["accepted"] for name, count in counts.items() if split in (None, name))
    elif split in subsets:
        sample_ids = subsets[split]["sample_ids"]
        wanted, expected = pads.field("sample_id").isin(sample_ids), len(sample_ids)
    else:
        raise DatasetError(f"{folder.url}: no split {split!r}; it has {', '.join(map(repr, [*counts, *subsets]))}")
    table = _rows(folder, ACCEPTED).to_table(columns=SAMPLE_SCHEMA.names, filter=wanted)
    if table.num_rows != expected:
        raise DatasetError(f"{folder.url}: {table.num_rows} rows where the manifest says {expected}; generate it again")
    samples = [sample_from_row(row) for batch in table.to_batches(256) for row in batch.to_pylist()]
    return sorted(samples, key=lambda sample: (sample.split, sample.sample_id))


def read_rejected(place: Place) -> list[tuple[Sample, tuple[str, ...]]]:
    """The refused rows with their reasons, in order of sample id."""
    folder = as_folder(place)
    read_manifest(folder)
    with damage_named(folder):
        rows = _rows(folder, REJECTED).to_table().to_pylist() if folder.exists(REJECTED) else []
        found = [(sample_from_row(row), tuple(row["reasons"])) for row in rows]
    return sorted(found, key=lambda item: item[0].sample_id)


@contextlib.contextmanager
def damage_named(folder: Folder) -> Iterator[None]:
    """What readers of JSON and Parquet raise, for bytes that they do not understand too, as a `DatasetError`."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError, pa.ArrowException) as error:
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise DatasetError(
            f"{folder.url}: its files cannot be read ({what}); if they are damaged, generate it again"
        ) from error


def _rows(folder: Folder, kind: str) -> pads.Dataset:
    return pads.dataset(folder.path_of(kind), schema=DRAFT_SCHEMA, format=SHARDS, filesystem=folder.filesystem)
