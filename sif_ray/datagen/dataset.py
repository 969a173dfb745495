"""The dataset folder: how it comes into being whole or not at all, and how it is read.

    manifest.json        configuration and its hash, counts, seconds, versions, hash of every shard
    data/*.parquet       accepted rows, columns of `ROW_SCHEMA`
    rejected/*.parquet   refused rows with their reasons, same columns
    published.json       accepted rows in the published layout; `export_images` writes the images that it names
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from sif_ray.config import ConfigError
from sif_ray.method.prompts import user_content
from sif_ray.records import SAMPLE_SCHEMA, Sample, sample_from_row

MANIFEST = "manifest.json"
ACCEPTED, REJECTED = "data", "rejected"
FORMAT = 1
ROW_SCHEMA = SAMPLE_SCHEMA.append(pa.field("reasons", pa.list_(pa.string())))
"""Columns of a shard: those of `Sample`, and why the row was refused (empty = accepted)."""

_SUFFIXES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}


class DatasetError(ConfigError):
    """A folder that is no dataset, another dataset than asked for, or one without the rows asked for."""


# --- reading ---------------------------------------------------------------------------------------------------------


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a finished dataset. Raises `DatasetError` where there is none."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise DatasetError(f"{folder}: no finished dataset ({MANIFEST} is missing); make one with sif-ray generate")
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT:
        raise DatasetError(f"{path}: format {manifest.get('format')!r}; this version reads {FORMAT}; generate it again")
    return manifest


def read_samples(folder: str | Path, split: str | None = None) -> list[Sample]:
    """The accepted rows of a split (None = all), by split and sample id: the rows of a scene are neighbours.

    Raises `DatasetError` for a folder without manifest, a split that it does not have, and missing or surplus rows.
    """
    counts = read_manifest(folder)["counts"]["splits"]
    if split is not None and split not in counts:
        raise DatasetError(f"{folder}: no split {split!r}; it has {', '.join(map(repr, sorted(counts)))}")
    rows = pads.dataset(Path(folder) / ACCEPTED, schema=ROW_SCHEMA)
    wanted = None if split is None else pads.field("split") == split
    table = rows.to_table(columns=SAMPLE_SCHEMA.names, filter=wanted)
    expected = sum(count["accepted"] for name, count in counts.items() if split in (None, name))
    if table.num_rows != expected:
        raise DatasetError(f"{folder}: {table.num_rows} rows where the manifest says {expected}; generate it again")
    samples = [sample_from_row(row) for batch in table.to_batches(256) for row in batch.to_pylist()]
    return sorted(samples, key=lambda sample: (sample.split, sample.sample_id))


def read_rejected(folder: str | Path) -> list[tuple[Sample, tuple[str, ...]]]:
    """The refused rows with their reasons, in order of sample id."""
    read_manifest(folder)
    rows = pads.dataset(Path(folder) / REJECTED, schema=ROW_SCHEMA).to_table().to_pylist()
    found = [(sample_from_row(row), tuple(row["reasons"])) for row in rows]
    return sorted(found, key=lambda item: item[0].sample_id)


# --- writing ---------------------------------------------------------------------------------------------------------


def is_finished(folder: str | Path, config_hash: str) -> bool:
    """Whether `folder` already holds the dataset of this hash; False if it can be written.

    Raises `DatasetError` if it holds something else.
    """
    folder = Path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / MANIFEST).is_file():
        raise DatasetError(f"output = {str(folder)!r} exists and is no dataset; choose another output")
    found = read_manifest(folder)["config_hash"]
    if found != config_hash:
        raise DatasetError(
            f"output = {str(folder)!r} holds a dataset of another configuration (hash {found}, now {config_hash}); "
            "choose another output or delete the folder"
        )
    return True


@contextlib.contextmanager
def whole_or_not_at_all(folder: str | Path) -> Iterator[Path]:
    """A working folder beside `folder`, which becomes `folder` when the body ends well and is deleted otherwise.

    What a killed run left there is deleted first.
    """
    folder = Path(folder).absolute()
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def order_shards(folder: Path) -> dict[str, dict[str, Any]]:
    """Name the shards of `folder` by their first sample id, so that equal datasets have equal names.

    Returns {"data/part-00000.parquet": {"rows": n, "sha256": ...}}.
    """
    found = {}
    for kind in (ACCEPTED, REJECTED):
        (folder / kind).mkdir(exist_ok=True)
        shards = {path: pq.read_table(path, columns=["sample_id"])["sample_id"] for path in (folder / kind).iterdir()}
        for number, path in enumerate(sorted(shards, key=lambda path: min(shards[path].to_pylist()))):
            named = path.with_name(f"part-{number:05d}.parquet")
            path.rename(named)
            digest = hashlib.sha256(named.read_bytes()).hexdigest()
            found[f"{kind}/{named.name}"] = {"rows": len(shards[path]), "sha256": digest}
    return found


def count_rows(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Counts for the manifest, and every sample id, accepted or not."""
    columns = ["sample_id", "scene_id", "split", "question_type", "depth_source", "reasons"]
    rows = pads.dataset([pads.dataset(folder / kind, schema=ROW_SCHEMA) for kind in (ACCEPTED, REJECTED)])
    splits: dict[str, dict[str, Any]] = {}
    reasons: Counter[str] = Counter()
    sample_ids = []
    for row in rows.to_table(columns=columns).to_pylist():
        empty = {"scenes": set(), "accepted": 0, "rejected": 0, "question_types": Counter(), "depth_sources": Counter()}
        count = splits.setdefault(row["split"], empty)
        sample_ids.append(row["sample_id"])
        count["scenes"].add(row["scene_id"])
        count["rejected" if row["reasons"] else "accepted"] += 1
        if not row["reasons"]:
            count["question_types"][row["question_type"]] += 1
            count["depth_sources"][row["depth_source"]] += 1
        reasons.update(row["reasons"])
    for count in splits.values():
        count["scenes"] = len(count["scenes"])
    total = {key: sum(count[key] for count in splits.values()) for key in ("scenes", "accepted", "rejected")}
    return {**total, "splits": splits, "reasons": dict(reasons)}, sample_ids


# --- the published layout --------------------------------------------------------------------------------------------


def write_published(folder: Path) -> None:
    """Write `published.json`: the accepted rows with the keys of the released dataset (method: target format)."""
    with (folder / "published.json").open("w", encoding="utf-8") as file:
        for number, sample in enumerate(_accepted(folder)):
            file.write("[\n" if number == 0 else ",\n")
            file.write(json.dumps(_published(sample), ensure_ascii=False))
        file.write("\n]\n")


def export_images(folder: str | Path) -> int:
    """Write the images that `published.json` names under `images/`; returns how many files."""
    folder = Path(folder)
    read_manifest(folder)
    (folder / "images").mkdir(exist_ok=True)
    written = set()
    for sample in _accepted(folder):
        for name, encoded in zip(_image_names(sample), (sample.image, sample.depth_image), strict=True):
            if name not in written:
                (folder / name).write_bytes(encoded)
                written.add(name)
    return len(written)


def _accepted(folder: Path) -> Iterator[Sample]:
    for path in sorted((folder / ACCEPTED).glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(64, columns=SAMPLE_SCHEMA.names):
            yield from map(sample_from_row, batch.to_pylist())


def _published(sample: Sample) -> dict[str, Any]:
    image, depth_image = _image_names(sample)
    user = "".join(part.get("text", "<image>") for part in user_content(sample.question))
    return {
        "dataset": sample.dataset,
        "image": image,
        "depth_image": depth_image,
        "problem": sample.question,
        "normalized_solution_round": {"bbox_3d": [list(box) for box in sample.frames[-1]], "illegal_content": False},
        "response": sample.answer,
        "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": sample.trace}],
        "images": [image, depth_image],
    }


def _image_names(sample: Sample) -> tuple[str, str]:
    suffix = next((suffix for magic, suffix in _SUFFIXES.items() if sample.image.startswith(magic)), ".img")
    return f"images/{sample.scene_id}{suffix}", f"images/{sample.scene_id}_d.png"
