"""What a source says about its pictures, before any of them is opened, and how it opens one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

import pyarrow as pa

Frame = Literal["pixels", "image", "padded_square"]
"""What the numbers of a source's boxes are: pixels, fractions of the image's sides, or fractions of the longer side
after the image was centred in a square (Visual-CoT)."""


@dataclass(frozen=True)
class Annotation:
    """One question about a picture, as the source states it.

    Example: `Annotation("gqa-7", "gqa", "val", "cot/gqa/2316539.jpg", "What ...?", "", "window",
    ((0.542, 0.686, 0.592, 0.786),), "padded_square")`.
    """

    sample_id: str  # the same in every run; unique among those of a dataset folder
    dataset: str
    split: str  # "" where the source names none
    image: str  # the source's own name of the picture, e.g. its path below the folder of images
    question: str
    question_type: str  # "" where the source has none
    answer: str
    boxes: tuple[tuple[float, ...], ...]  # evidence x1, y1, x2, y2 in `frame`; not checked
    frame: Frame
    names: tuple[str, ...] = ()  # of the evidence, one per box, without an article; () where the source has none
    width: int = 0  # px, as the source states it; 0 = it does not
    height: int = 0  # px
    depth: str = ""  # the source's own name of a picture of the depth; "" where the source has none
    error: str = ""  # why it cannot become a row, a stable word; "" = it may


@dataclass(frozen=True)
class Picture:
    """A picture that a source has opened, encoded as it came."""

    annotation: Annotation  # as it was, or completed by what only the opened picture tells
    image: bytes
    depth_image: bytes = b""  # PNG in pseudo-colour of measured or exact depth; empty = to be estimated
    depth_source: str = ""  # "measured" or "exact"; empty = to be estimated


class Source(Protocol):
    """Annotations and their pictures. It is pickled to the workers, so it holds no data."""

    def annotations(self) -> Iterator[Annotation]:
        """Every annotation in a fixed order, streamed: what cannot be read comes with its `error`.

        Raises `ConfigError` for a file that is missing or of another format.
        """

    def open(self, annotation: Annotation) -> Picture:
        """The picture of an annotation, on a worker; equal annotations give equal pictures.

        Raises `PhotoError` (sif_ray.datagen.pictures) where it is missing or cannot be read.
        """


ANNOTATION_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("dataset", pa.string()),
        ("split", pa.string()),
        ("image", pa.string()),
        ("question", pa.string()),
        ("question_type", pa.string()),
        ("answer", pa.string()),
        ("boxes", pa.list_(pa.list_(pa.float64()))),
        ("frame", pa.string()),
        ("names", pa.list_(pa.string())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("depth", pa.string()),
        ("error", pa.string()),
    ]
)
"""Arrow schema of annotations: the fields of `Annotation`, in order."""


def annotation_to_row(annotation: Annotation) -> dict[str, Any]:
    """The annotation as an Arrow row (lists instead of tuples)."""
    row = {field.name: getattr(annotation, field.name) for field in fields(annotation)}
    return {**row, "boxes": [list(box) for box in annotation.boxes], "names": list(annotation.names)}


def annotation_from_row(row: dict[str, Any]) -> Annotation:
    """The inverse of `annotation_to_row`."""
    return Annotation(**{**row, "boxes": tuple(map(tuple, row["boxes"])), "names": tuple(row["names"])})
