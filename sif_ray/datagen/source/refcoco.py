"""RefCOCO, RefCOCO+ and RefCOCOg as JSON Lines: `img_path, expression, bbox (pixels), width, height, dataset_name`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sif_ray.datagen.annotations import Annotation
from sif_ray.datagen.source.fields import make_annotation, side_px, text
from sif_ray.method.boxes import BoxError, as_rectangle

LAYOUTS = (("expression", "bbox", "img_path"),)
PROMPT = "Please provide the bounding box coordinate of the region this sentence describes: {expression}."


def to_annotation(row: Mapping[str, Any], stem: str, profile: str) -> Annotation:
    """A referring expression in the released prompt. The files have no answer but the box, so it is the answer."""
    expression = text(row.get("expression"))
    return make_annotation(
        row,
        dataset=text(row.get("dataset_name")).rpartition("/")[2] or stem,
        image=row.get("img_path"),
        question=expression and PROMPT.format(expression=expression),
        answer=box_text(row),
        boxes=only_box(row),
        frame="pixels",
    )


def only_box(row: Mapping[str, Any]) -> list[object]:
    """The boxes of a row with one box, in pixels."""
    return [row["bbox"]] if row.get("bbox") else []


def box_text(row: Mapping[str, Any]) -> str:
    """The box of a row as fractions of the image with three decimals; "" without a box or the size of its image."""
    width, height = side_px(row.get("width")), side_px(row.get("height"))
    try:
        x1, y1, x2, y2 = as_rectangle(row.get("bbox"))
    except BoxError:
        return ""
    if not width or not height:
        return ""
    numbers = (x1 / width, y1 / height, x2 / width, y2 / height)
    return f"[{', '.join(f'{min(max(number, 0.0), 1.0):.3f}' for number in numbers)}]"
