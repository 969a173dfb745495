"""`sif-ray data convert`: annotations of any source to one JSON object per line, boxes as fractions of their image."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from sif_ray.config import SOURCES, ConfigError, GenerateConfig, validate
from sif_ray.datagen.annotations import Annotation, Source
from sif_ray.datagen.depth_stage import to_image_frame
from sif_ray.datagen.pictures import PhotoError
from sif_ray.datagen.selection import unique_ids
from sif_ray.datagen.source import make_source
from sif_ray.datagen.source.files import FileSource
from sif_ray.method.boxes import BoxError
from sif_ray.observe.progress import Progress

log = logging.getLogger(__name__)

_WHERE_KNOWN = ("split", "question_type", "names", "depth")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `run`."""
    parser.add_argument("--source", required=True, choices=SOURCES, help="what the annotations are")
    parser.add_argument("--input", nargs="+", default=[], metavar="FILE", help="paths, URLs or patterns of their files")
    parser.add_argument("--images", default="", metavar="DIR", help="folder or URL of the images: for unstated sizes")
    parser.add_argument("--output", required=True, type=Path, metavar="OUT.jsonl", help="the file to write")
    parser.add_argument(
        "--profile", default="corrected", choices=("corrected", "published"), help="published: misread as released"
    )


def run(options: argparse.Namespace) -> None:
    """Write what was asked for, and what is refused to `OUT.rejected.jsonl`, if there is any.

    Raises `ConfigError` for a wrong request, for input that cannot be read, and if every annotation is refused.
    """
    config = GenerateConfig(source=options.source, input=options.input, images=options.images, profile=options.profile)
    validate(config)
    _check_output(options.output)
    rejected = options.output.with_suffix(".rejected.jsonl")
    reasons = convert(make_source(config), config.profile, options.output, rejected)
    num_written = reasons.pop("", 0)
    for reason, count in sorted(reasons.items()):
        log.warning("convert: %d annotations refused: %s", count, reason)
    if reasons:
        log.warning("convert: %d refused in all -> %s", reasons.total(), rejected)
    if not num_written:
        raise ConfigError(
            f"output = {str(options.output)!r} is not written: no annotation was accepted; {rejected} says why"
        )
    log.info("convert: %d annotations -> %s", num_written, options.output)


def _check_output(output: Path) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output = {str(output)!r} cannot be written: {error}") from error
    if output.is_dir():
        raise ConfigError(f"output = {str(output)!r} is a folder; name a file, e.g. annotations.jsonl")


def convert(source: Source, profile: str, output: Path, rejected: Path) -> Counter[str]:
    """Write the accepted and the refused annotations, each file whole or not at all, and none that would be empty.

    Returns how many there are by the reason of their refusal, "" = accepted. Raises `ConfigError` as the source.
    """
    reasons: Counter[str] = Counter()
    rejected.unlink(missing_ok=True)  # of an earlier time
    with _replacing(output) as lines, _replacing(rejected) as refused_lines, Progress("convert") as progress:
        for annotation in unique_ids(source.annotations()):
            try:
                lines.write(_line(accepted_fields(annotation, source, profile)))
                reason = ""
            except RefusedError as error:
                reason = str(error)
                refused_lines.write(_line(_refused_fields(annotation, reason)))
            reasons[reason] += 1
            progress.advance()
    return reasons


class RefusedError(ValueError):
    """An annotation that cannot be converted; the message is its reason, a stable word."""


def accepted_fields(annotation: Annotation, source: Source, profile: str) -> dict[str, Any]:
    """What is written of an annotation, in the layout that the sources jsonl and parquet read.

    Raises `RefusedError` for one with an error, a picture that is needed and cannot be used, or boxes that are none.
    """
    if annotation.error:
        raise RefusedError(annotation.error)
    try:
        annotation = _with_size(annotation, source)
        size_px = (annotation.width, annotation.height)
        boxes = [to_image_frame(box, annotation.frame, *size_px, profile) for box in annotation.boxes]
    except PhotoError as error:
        raise RefusedError(error.reason) from error
    except BoxError as error:
        raise RefusedError("boxes_invalid") from error
    fields = {
        "id": annotation.sample_id,
        "dataset": annotation.dataset,
        "image": annotation.image,
        "width": annotation.width,
        "height": annotation.height,
        "question": annotation.question,
        "answer": annotation.answer,
        "boxes": boxes,
    }
    return fields | {name: value for name in _WHERE_KNOWN if (value := getattr(annotation, name))}


def _with_size(annotation: Annotation, source: Source) -> Annotation:
    if not isinstance(source, FileSource):
        return source.open(annotation).annotation
    if annotation.width and annotation.height:
        return annotation
    width, height = source.pictures.size_px(annotation.image)
    return replace(annotation, width=width, height=height)


def _refused_fields(annotation: Annotation, reason: str) -> dict[str, Any]:
    """What is known of it, its boxes as they came."""
    shown = ("dataset", "image", "question", "answer", "boxes", "frame")
    return {"id": annotation.sample_id, "reason": reason} | {name: getattr(annotation, name) for name in shown}


def _line(fields: dict[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False, allow_nan=False) + "\n"


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    """A file that takes the place of `path` when the body ends well and something was written."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            yield file
        if part.stat().st_size:
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)
