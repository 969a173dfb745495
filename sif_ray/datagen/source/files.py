"""Annotations from files, with pictures that lie in a folder or in an object store."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sif_ray.config import ConfigError
from sif_ray.datagen.annotations import Annotation, Picture
from sif_ray.datagen.source import own, refcoco, tallyqa, viscot
from sif_ray.datagen.source.coco import coco_annotations
from sif_ray.datagen.source.depth import colour_depth
from sif_ray.datagen.source.fields import broken_annotation
from sif_ray.datagen.source.picture_folder import PictureFolder
from sif_ray.datagen.source.rows import InputFile, Row, input_files, json_rows, parquet_rows

_HEAD_ROWS = 100  # one of them has a layout of the format, or the file is of another one


@dataclass(frozen=True)
class RowFormat:
    """A format of files with one annotation per row."""

    rows: Callable[[InputFile], Iterator[Row]]
    layouts: tuple[tuple[str, ...], ...]  # a row has all fields of one of them
    to_annotation: Callable[[Mapping[str, Any], str, str], Annotation]  # of row, name of the file, profile


FORMATS = {
    "viscot": RowFormat(json_rows, viscot.LAYOUTS, viscot.to_annotation),
    "tallyqa": RowFormat(json_rows, tallyqa.LAYOUTS, tallyqa.to_annotation),
    "refcoco": RowFormat(json_rows, refcoco.LAYOUTS, refcoco.to_annotation),
    "jsonl": RowFormat(json_rows, own.LAYOUTS, own.to_annotation),
    "parquet": RowFormat(parquet_rows, own.LAYOUTS, own.to_annotation),
}


@dataclass(frozen=True)
class FileSource:
    """Annotations of `input` in one of `FORMATS`, or in that of COCO."""

    format: str
    input: tuple[str, ...]  # paths and URLs; the last part may be a pattern
    pictures: PictureFolder
    profile: str

    def annotations(self) -> Iterator[Annotation]:
        self.pictures.check()
        for file in input_files(self.input):
            yield from coco_annotations(file) if self.format == "coco" else self._row_annotations(file)

    def open(self, annotation: Annotation) -> Picture:
        image = self.pictures.read(annotation.image)
        if not annotation.depth:
            return Picture(annotation, image)
        depth_image = colour_depth(self.pictures.read(annotation.depth, "depth"))
        return Picture(annotation, image, depth_image=depth_image, depth_source="measured")

    def _row_annotations(self, file: InputFile) -> Iterator[Annotation]:
        row_format, stem = FORMATS[self.format], file.stem
        rows = row_format.rows(file)
        head = list(itertools.islice(rows, _HEAD_ROWS))
        self._check_layout(file, head)
        for number, row in itertools.chain(head, rows):
            if row is None:
                yield broken_annotation(f"{file.name}:{number}", "json_broken")
            else:
                yield row_format.to_annotation(row, stem, self.profile)

    def _check_layout(self, file: InputFile, head: list[Row]) -> None:
        layouts = FORMATS[self.format].layouts
        if any(row is not None and any(row.keys() >= set(layout) for layout in layouts) for _, row in head):
            return
        expected = " or ".join(f"the fields {', '.join(layout)}" for layout in layouts)
        raise ConfigError(
            f"input = {file.path!r} is not of source {self.format!r}, whose rows have {expected}: {_told(head)}"
        )


def _told(head: list[Row]) -> str:
    """What the first row of a file is."""
    if not head:
        return "it is empty"
    number, row = head[0]
    return f"row {number} is no JSON object" if row is None else f"row {number} has {', '.join(map(str, row))}"
