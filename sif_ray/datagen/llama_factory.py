"""`sif-ray data import`: traces in LLaMA-Factory's multimodal ShareGPT layout to a dataset folder, to train on.

The layout is that of the released data and of published.json: a list of rows with `messages` and `images`, the names of
these and of the tags in a `dataset_info.json` beside the file where they are others. A row is one user turn that shows
a photograph and its depth, and one assistant turn, which is the trace.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ijson

from sif_ray.config import ConfigError
from sif_ray.datagen.counts import Counts
from sif_ray.datagen.dataset import FORMAT, MANIFEST
from sif_ray.datagen.drafts import Draft
from sif_ray.datagen.pictures import PhotoError, read
from sif_ray.datagen.published import REGISTRATION
from sif_ray.datagen.shards import commit
from sif_ray.datagen.source.picture_folder import PictureFolder
from sif_ray.datagen.source.rows import BROKEN_JSON
from sif_ray.method.prompts import SUFFIX, SUFFIX_WITH_DEPTH_WORDS
from sif_ray.method.trace import TraceError, parse
from sif_ray.observe.run_folder import environment
from sif_ray.records import Sample
from sif_ray.storage import Folder

log = logging.getLogger(__name__)

ROWS_PER_SHARD = 64
_PROMPT = re.compile(r"(?:Original image: ?)?<image>\s*(?:Depth image: ?)?<image>\s*(.*)", re.DOTALL)


@dataclass(frozen=True)
class Layout:
    """The names that `dataset_info.json` may change; these are LLaMA-Factory's own."""

    messages: str = "conversations"
    images: str = "images"
    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str = "human"
    assistant_tag: str = "gpt"
    system_tag: str = "system"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `run`."""
    parser.add_argument("file", type=Path, help="JSON file of rows")
    parser.add_argument(
        "--images", default="", metavar="DIR", help="folder or URL of the images (default: of the file)"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="dataset folder or URL to write")
    parser.add_argument("--split", default="train", help="the split that every row gets")
    parser.add_argument("--profile", default="corrected", choices=("corrected", "published"), help="their grammar")


def run(options: argparse.Namespace) -> None:
    """Write the dataset folder. Raises `ConfigError` for a file that is no such list, and if no row is accepted."""
    started_s = time.time()
    output = Folder.open(options.output, "--output")
    if output.names():
        raise ConfigError(f"--output {output.url}: is not empty; choose another folder")
    pictures = PictureFolder.of(options.images or str(options.file.parent))
    pictures.check()
    drafts = read_drafts(options.file, pictures, options.split, options.profile)
    counts, files = Counts(), {}
    for shard in itertools.count():
        part = list(itertools.islice(drafts, ROWS_PER_SHARD))
        if not part:
            break
        summary = commit(output, shard, part, [draft.sample.sample_id for draft in part])
        counts.add(summary["rows"])
        files |= {file["name"]: {"rows": file["rows"], "sha256": file["sha256"]} for file in summary["files"]}
    total = counts.total()
    if not total["accepted"]:
        raise ConfigError(f"{options.file}: no row of {total['rejected']} can be trained on: {total['reasons']}")
    manifest = {
        "format": FORMAT,
        "config": {"source": "llama_factory", "input": [str(options.file)], "profile": options.profile},
        "counts": total,
        "shards": files,
        "seconds": round(time.time() - started_s, 1),
        "environment": environment(),
    }
    output.write_json(MANIFEST, manifest)
    log.info("data import: %d rows, %d refused -> %s", total["accepted"], total["rejected"], output.url)
    for reason, count in total["reasons"].items():
        log.warning("data import: %d rows refused: %s", count, reason)


def read_drafts(file: Path, pictures: PictureFolder, split: str, profile: str) -> Iterator[Draft]:
    """Every row in order, refused with a reason where it cannot be trained on; the file is read as a stream."""
    layout = find_layout(file)
    try:
        with file.open("rb") as stream:
            for number, row in enumerate(ijson.items(stream, "item", use_float=True)):
                yield _draft(row, f"{file.stem}-{number}", layout, pictures, split, profile)
    except (OSError, *BROKEN_JSON) as error:
        raise ConfigError(f"{file}: cannot be read as a JSON list of rows ({error})") from error


def find_layout(file: Path) -> Layout:
    """The layout that the `dataset_info.json` beside a file gives it, else that of `published.json`."""
    registered = file.with_name(REGISTRATION)
    entries = json.loads(registered.read_text(encoding="utf-8")).values() if registered.is_file() else ()
    entry: dict[str, Any] | None = next((entry for entry in entries if entry.get("file_name") == file.name), None)
    if entry is None:
        return Layout("messages", "images", "role", "content", "user", "assistant")
    if entry.get("formatting", "alpaca") != "sharegpt":
        raise ConfigError(
            f"{registered}: {file.name} is of formatting {entry.get('formatting', 'alpaca')!r}, not sharegpt"
        )
    columns, tags = entry.get("columns", {}), entry.get("tags", {})
    changed = {name: columns[name] for name in ("messages", "images") if name in columns}
    return Layout(**changed, **{name: value for name, value in tags.items() if name in Layout.__dataclass_fields__})


def _draft(
    row: dict[str, Any], sample_id: str, layout: Layout, pictures: PictureFolder, split: str, profile: str
) -> Draft:
    turns = [
        (turn.get(layout.role_tag), str(turn.get(layout.content_tag, "")))
        for turn in row.get(layout.messages) or ()
        if turn.get(layout.role_tag) != layout.system_tag
    ]
    names = [str(name) for name in row.get(layout.images) or ()]
    question, trace = "", ""
    reasons = []
    if [role for role, _ in turns] == [layout.user_tag, layout.assistant_tag]:
        asked = _PROMPT.fullmatch(turns[0][1])
        question = _without_suffix(asked[1]) if asked else ""
        trace = turns[1][1]
        reasons += [] if asked else ["prompt_not_photograph_and_depth"]
    else:
        reasons.append("turns_not_one_question_and_answer")
    if len(names) != 2:
        reasons.append("images_not_two")
    encoded, size = (b"", b""), (0, 0)
    if not reasons:
        try:
            photo, depth = (read(pictures.read(name)) for name in names)
            encoded, size = (photo.encoded, depth.encoded), photo.rgb.size
        except PhotoError as error:
            reasons.append(error.reason)
    frames: tuple[Any, ...] = ()
    answer = ""
    try:
        parsed = parse(trace, profile)
        frames, answer = tuple(tuple(box.bbox_2d for box in step.boxes) for step in parsed.steps), parsed.answer
    except TraceError as error:
        reasons += [f"trace_{reason}" for reason in error.reasons] if trace else []
    sample = Sample(
        sample_id=sample_id,
        scene_id=names[0] if names else sample_id,
        dataset=str(row.get("dataset", "llama_factory")),
        split=split,
        question=question,
        question_type="",
        answer=answer,
        boxes=frames[-1] if frames else (),
        width=size[0],
        height=size[1],
        image=encoded[0],
        depth_image=encoded[1],
        depth_source="imported",
        source_frame="image",
        frames=frames,
        trace=trace,
        profile=profile,
    )
    return Draft(sample, reasons=tuple(dict.fromkeys(reasons)))


def _without_suffix(text: str) -> str:
    for suffix in (SUFFIX_WITH_DEPTH_WORDS, SUFFIX):
        text = text.removesuffix(suffix)
    return text.strip()
