"""The accepted rows in the released layout (method: target format), as LLaMA-Factory reads it.

    published.json           every accepted row
    published-sampled.json   those of the subset "sampled"
    dataset_info.json        how LLaMA-Factory reads the two
    subsets.json             {"sampled": {"seed": ..., "sample_ids": [...]}}

`sif-ray data export` adds the images that they name.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pyarrow.fs import copy_files

from sif_ray.config import GenerateConfig
from sif_ray.datagen import subsets
from sif_ray.datagen.dataset import ACCEPTED, SUBSETS, DatasetError, read_manifest
from sif_ray.datagen.scan import scan
from sif_ray.method.prompts import user_content
from sif_ray.storage import Folder

log = logging.getLogger(__name__)

ALL_ROWS, SAMPLED_ROWS = "published.json", "published-sampled.json"
REGISTRATION = "dataset_info.json"
_COLUMNS = ("sample_id", "scene_id", "dataset", "question", "answer", "frames", "trace")
_WRITERS = 16  # an object store answers many writers as fast as one
_PLACEHOLDER = re.compile("<(image|video|audio)>")  # LLaMA-Factory counts these words and wants a file for each


def publish(folder: Folder, config: GenerateConfig) -> None:
    """Write the four files from the shards of `folder`. It reads no image, and holds of every row the id."""
    drawn = subsets.draw_subsets((batch for _, batch in scan(folder.child(ACCEPTED), subsets.COLUMNS)), config)
    files = {"sif": ALL_ROWS}
    _write_rows(folder, ALL_ROWS)
    if subsets.SAMPLED in drawn:
        files[f"sif_{subsets.SAMPLED}"] = SAMPLED_ROWS
        _write_rows(folder, SAMPLED_ROWS, frozenset(drawn[subsets.SAMPLED]["sample_ids"]))
    folder.write_json(REGISTRATION, {name: _registration(file) for name, file in files.items()})
    folder.write_json(SUBSETS, drawn)


def export(folder: Folder, output: Folder) -> int:
    """Make `output` a dataset folder of LLaMA-Factory: the published files and the images that they name, as they are
    in the shards. Returns the number of images.

    Raises `DatasetError` where `folder` is no finished dataset or was not published, and where `output` registers other
    datasets.
    """
    read_manifest(folder)
    if not folder.exists(REGISTRATION):
        raise DatasetError(f"{folder.url}: {REGISTRATION} is missing, as in a dataset that was imported")
    if output.exists(REGISTRATION) and output.read(REGISTRATION) != folder.read(REGISTRATION):
        raise DatasetError(f"output = {output.url!r} registers other datasets in {REGISTRATION}; choose another folder")
    if (output.filesystem, Path(output.path).resolve()) != (folder.filesystem, Path(folder.path).resolve()):
        for name in filter(folder.exists, (ALL_ROWS, SAMPLED_ROWS, REGISTRATION)):
            output.filesystem.create_dir(output.path)
            copy_files(folder.path_of(name), output.path_of(name), folder.filesystem, output.filesystem)
    written: set[str] = set()
    with ThreadPoolExecutor(_WRITERS) as pool:
        for _, batch in scan(folder.child(ACCEPTED), ("scene_id", "image", "depth_image")):
            images: dict[str, bytes] = {}
            for row in batch.to_pylist():
                images |= zip(image_names(row["scene_id"]), (row["image"], row["depth_image"]), strict=True)
            new = images.keys() - written
            list(pool.map(output.write, new, map(images.__getitem__, new)))
            written |= new
    return len(written)


def image_names(scene_id: str) -> tuple[str, str]:
    """Where photograph and depth image of a scene lie, below the folder. Different scenes have different names."""
    escaped = re.sub(r"[^\w. ()+,=@/-]", lambda match: f"%{ord(match[0]):02X}", scene_id)
    parts = [part.replace(".", "%2E") if set(part) <= {"."} else part for part in escaped.split("/")]
    name = "/".join(part or "%" for part in parts)  # an absolute path stays below the folder, too
    return f"images/{name}", f"depth/{name}.png"


def _write_rows(folder: Folder, name: str, only: Collection[str] | None = None) -> None:
    with folder.filesystem.open_output_stream(folder.path_of(name)) as file:
        start = "[\n"
        for row in _rows(folder, only):
            file.write(f"{start}{json.dumps(row, ensure_ascii=False)}".encode())
            start = ",\n"
        file.write(b"[]\n" if start == "[\n" else b"\n]\n")


def _rows(folder: Folder, only: Collection[str] | None) -> Iterator[dict[str, Any]]:
    for _, batch in scan(folder.child(ACCEPTED), _COLUMNS):
        for row in batch.to_pylist():
            if only is None or row["sample_id"] in only:
                yield _published(row)


def _published(row: dict[str, Any]) -> dict[str, Any]:
    image, depth_image = image_names(row["scene_id"])
    texts = [part.get("text") for part in user_content(row["question"])]
    user = "".join("<image>" if text is None else _without_placeholders(text) for text in texts)
    return {
        "dataset": row["dataset"],
        "image": image,
        "depth_image": depth_image,
        "problem": row["question"],
        "normalized_solution_round": {"bbox_3d": row["frames"][-1], "illegal_content": False},
        "response": row["answer"],
        "messages": [
            {"role": "user", "content": user},
            {"role": "assistant", "content": _without_placeholders(row["trace"])},
        ],
        "images": [image, depth_image],
    }


def _without_placeholders(text: str) -> str:
    """A word that LLaMA-Factory would take for an image of its own gets a space: "< image>"."""
    return _PLACEHOLDER.sub(r"< \1>", text)


def _registration(file: str) -> dict[str, Any]:
    return {
        "file_name": file,
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }


# --- sif-ray data export ---------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="a finished dataset, or its URL")
    parser.add_argument("--output", metavar="DIR", help="where the files go (default: into FOLDER)")


def run(options: argparse.Namespace) -> None:
    """Raises `DatasetError` as `export`."""
    output = Folder.open(options.output or options.folder, "output")
    num_images = export(Folder.open(options.folder), output)
    log.info("data export: %d images -> %s, which is a dataset_dir of LLaMA-Factory", num_images, output.url)
