"""Annotation files in the layout of COCO: `images`, `annotations` with `bbox` as x, y, width, height in pixels, and
`categories`. Every category that an image shows becomes one counting question."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from typing import Any

from sif_ray.config import ConfigError
from sif_ray.datagen.annotations import Annotation
from sif_ray.datagen.source.fields import broken_annotation, make_annotation, text
from sif_ray.datagen.source.rows import InputFile, array_items
from sif_ray.datagen.teacher import plural
from sif_ray.method.boxes import BoxError, as_rectangle


def coco_annotations(file: InputFile) -> Iterator[Annotation]:
    """The questions of a file, by image and then by category.

    A category of which an image has a crowd is left out there, as the crowd's members have no boxes. An annotation of
    an image or a category that the file does not list has the error `reference_unknown`. The file is read once for each
    of its arrays; names and boxes stay in memory. Raises `ConfigError` for a file of another format.
    """
    names = {text(item.get("id")): text(item.get("name")) for item in _items(file, "categories")}
    images = {
        text(item.get("id")): {key: item.get(key) for key in ("file_name", "width", "height")}
        for item in _items(file, "images")
    }
    objects: dict[str, dict[str, _Objects]] = {image: {} for image in images}
    for number, item in enumerate(_items(file, "annotations"), start=1):
        image, category = text(item.get("image_id")), text(item.get("category_id"))
        if image in images and names.get(category):
            objects[image].setdefault(category, _Objects()).add(item)
        else:
            yield broken_annotation(f"{file.name}:annotations:{number}", "reference_unknown")
    for image, fields in images.items():
        for category, found in sorted(objects.pop(image).items()):
            if not found.has_crowd:
                yield _question(file.stem, fields | {"id": f"{image}-{category}"}, names[category], found.boxes())


class _Objects:
    """Those of one category in one image."""

    def __init__(self) -> None:
        self.has_crowd = False
        self._is_valid = True
        self._numbers = array("d")  # x, y, width, height of one after the other

    def add(self, item: Mapping[str, Any]) -> None:
        self.has_crowd |= bool(item.get("iscrowd"))
        try:
            self._numbers.extend(as_rectangle(item.get("bbox")))
        except BoxError:
            self._is_valid = False

    def boxes(self) -> list[Any]:
        """x1, y1, x2, y2 of each; something else if one of them has no box."""
        if not self._is_valid:
            return [None]
        corners = (self._numbers[start : start + 4] for start in range(0, len(self._numbers), 4))
        return [(x, y, x + width, y + height) for x, y, width, height in corners]


def _question(dataset: str, row: Mapping[str, Any], name: str, boxes: list[Any]) -> Annotation:
    return make_annotation(
        row,
        dataset=dataset,
        image=row["file_name"],
        question=f"How many {plural(name)} are there?",
        question_type="count",
        answer=len(boxes),
        boxes=boxes,
        frame="pixels",
        names=[name] * len(boxes),
    )


def _items(file: InputFile, field: str) -> Iterator[dict[str, Any]]:
    """The objects of an array of the file; an empty one for what is none."""
    count = 0
    with file.open() as stream:
        for item in array_items(file, stream, f"{field}.item"):
            count += 1
            yield item if isinstance(item, dict) else {}
    if count == 0:
        raise ConfigError(f"input = {file.path!r} has nothing in the field {field!r}; source coco needs it")
