"""What the rows of a dataset depend on: two runs of equal content make equal rows, and may share a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from sif_ray.config import GenerateConfig
from sif_ray.datagen.checks import EXPLANATIONS
from sif_ray.datagen.dataset import DatasetError
from sif_ray.datagen.source.rows import InputFile, input_files
from sif_ray.method import prompts
from sif_ray.method.boxes import FULL_IMAGE
from sif_ray.method.trace import AreaBox
from sif_ray.storage import Folder

VERSION = 1
"""Of the code that makes rows. One more when equal configurations give other rows: sentences, prompts, checks."""

_KEYS = ("source", "images", "heldout_share", "subset_rows", "seed", "profile", "decimals", "rows_per_shard")
_TOYWORLD_KEYS = ("scenes_per_split", "questions_per_scene")
_TEACHER_KEYS = ("kind", "model", "max_tokens", "temperature", "repairs")
_JUDGE_KEYS = ("kind", "model", "with_image")


def content_of(config: GenerateConfig) -> dict[str, Any]:
    """The keys that say what is made, not where and how fast; input files and weights by what is in them.

    Pictures count by their place alone: there may be a million of them. Raises `ConfigError` for an input file that is
    not there.
    """
    content: dict[str, Any] = {"version": VERSION, **{name: getattr(config, name) for name in _KEYS}}
    content["input"] = [{file.name: fingerprint(file)} for file in input_files(config.input)]
    content["select"] = asdict(config.select)
    content["depth_model"] = {"name": config.depth_model, "weights": _weights_hash(config.depth_model)}
    if config.source == "toyworld":
        content |= {name: getattr(config, name) for name in _TOYWORLD_KEYS}
    content["teacher"] = {"kind": config.teacher.kind}
    if config.teacher.kind != "template":
        content["teacher"] = {name: getattr(config.teacher, name) for name in _TEACHER_KEYS}
        content["judge"] = {name: getattr(config.judge, name) for name in _JUDGE_KEYS}
        content["prompts"] = _hash_of_texts(_prompts(config.decimals))
    return content


def hash_of(content: Mapping[str, Any]) -> str:
    """A short hash of what `content_of` returned."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def differing_keys(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys in which two contents differ, those of blocks with a dot: ["decimals", "select.max_rows"]."""
    found = []
    for key in sorted(one.keys() | other.keys()):
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differing_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}")
    return found


def refuse_other_content(folder: Folder, found: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Raise `DatasetError` unless `found`, a plan or manifest in `folder`, is of `content` (`content_of`)."""
    if found["config_hash"] != hash_of(content):
        keys = ", ".join(differing_keys(found["content"], content))
        raise DatasetError(
            f"output = {folder.url!r} holds rows of another configuration: {keys} differ; choose another output or "
            "delete the folder"
        )


def fingerprint(file: InputFile) -> str:
    """Of a local file the hash of its bytes, as copies get other times; of an object its size and the time of its
    upload, as it cannot change without another upload and may be too far away to be read twice."""
    if isinstance(file.filesystem, pafs.LocalFileSystem):
        return _file_hash(Path(file.path))
    info = file.filesystem.get_file_info(file.path)
    return f"{info.size} bytes of {info.mtime_ns}"


def _prompts(decimals: int) -> Iterator[str]:
    """All that a teacher and a judge are told, about a row without words."""
    yield prompts.teacher_system("", "", decimals)
    yield from (part.get("text", "") for part in prompts.teacher_content([[AreaBox(FULL_IMAGE, 0.5)]], decimals))
    yield prompts.teacher_repair(list(EXPLANATIONS.values()))
    yield prompts.judge_system()
    yield prompts.judge_user("", "", "")


def _weights_hash(model: str) -> str:
    from sif_ray.depth.checkpoint import resolve_model

    return _hash_of_texts(_file_hash(path) for path in sorted(Path(resolve_model(model)).glob("*.safetensors")))


def _hash_of_texts(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
