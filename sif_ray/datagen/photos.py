"""Annotated photographs, the rows that a source yields: one image with the questions asked about it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa

from sif_ray.datagen.pictures import PhotoError as PhotoError
from sif_ray.datagen.pictures import decode as decode
from sif_ray.method.boxes import Box


@dataclass(frozen=True)
class Annotation:
    """One question about a photograph.

    Example: `Annotation("toy-7-closer", "closer", "Which is ...?", "red ball", boxes, ("red ball", "blue box"))`.
    """

    sample_id: str
    question_type: str
    question: str
    answer: str
    boxes: tuple[Box, ...]  # evidence, bbox_xyxy_norm in the image frame
    names: tuple[str, ...]  # of the evidence, one per box, without an article


@dataclass(frozen=True)
class Photo:
    """One photograph with its questions."""

    scene_id: str
    dataset: str
    split: str
    image: bytes  # encoded, as it came
    annotations: tuple[Annotation, ...]
    source_frame: str = "image"  # frame of the source's boxes before conversion
    depth_image: bytes = b""  # PNG of measured or exact depth; empty = to be estimated
    depth_source: str = ""  # empty = to be estimated
    width: int = 0  # px; 0 = not decoded yet
    height: int = 0  # px
    error: str = ""  # the reason why the photograph cannot be used


_ANNOTATION = pa.struct(
    [
        ("sample_id", pa.string()),
        ("question_type", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("boxes", pa.list_(pa.list_(pa.float64()))),
        ("names", pa.list_(pa.string())),
    ]
)
PHOTO_SCHEMA = pa.schema(
    [
        ("scene_id", pa.string()),
        ("dataset", pa.string()),
        ("split", pa.string()),
        ("image", pa.binary()),
        ("annotations", pa.list_(_ANNOTATION)),
        ("source_frame", pa.string()),
        ("depth_image", pa.binary()),
        ("depth_source", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("error", pa.string()),
    ]
)
"""Arrow schema of a batch of photographs: the fields of `Photo`, in order."""


def photos_to_table(photos: list[Photo]) -> pa.Table:
    """A table of `PHOTO_SCHEMA`."""
    return pa.Table.from_pylist([_to_row(photo) for photo in photos], schema=PHOTO_SCHEMA)


def photos_from_table(table: pa.Table) -> list[Photo]:
    """The inverse of `photos_to_table`."""
    return [_from_row(row) for row in table.to_pylist()]


def _to_row(photo: Photo) -> dict[str, Any]:
    row = {field.name: getattr(photo, field.name) for field in fields(photo)}
    row["annotations"] = [
        {field.name: getattr(item, field.name) for field in fields(item)} for item in photo.annotations
    ]
    return row


def _from_row(row: dict[str, Any]) -> Photo:
    annotations = tuple(
        Annotation(**{**item, "boxes": tuple(map(tuple, item["boxes"])), "names": tuple(item["names"])})
        for item in row["annotations"]
    )
    return Photo(**{**row, "annotations": annotations})
