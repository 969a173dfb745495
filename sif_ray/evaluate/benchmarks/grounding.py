"""Boxes against boxes: the share of items whose IoU is above one half, in both frames.

Strict: the hull of the last area's boxes, read as fractions of the image. Published (the scorer of Visual-CoT, and
through it the scripts of SIFThinker): fractions of the padded square, `box * max(width, height)` against the target
moved by the padding; a last area of several boxes has no box at all, as its hull was computed wrongly.
"""

from __future__ import annotations

from collections.abc import Sequence

from sif_ray.evaluate.benchmarks.files import Row
from sif_ray.evaluate.benchmarks.item import Item, Reply
from sif_ray.evaluate.measure import Point, point
from sif_ray.evaluate.replies import last_boxes
from sif_ray.method.boxes import Box, hull, iou

MIN_IOU = 0.5  # exclusive

CONVENTIONS = (
    "strict: hull of the last area, in fractions of the image; published: in fractions of the padded square, and no "
    "box where the last area has several"
)


def has_box(reply: Reply) -> bool:
    """Whether the last area has a box."""
    return bool(last_boxes(reply.text))


def box_point(reply: Reply) -> Point:
    """1 where the IoU is above :data:`MIN_IOU`, else 0."""
    boxes = last_boxes(reply.text)
    found = bool(boxes) and _image_iou(hull(boxes), reply.item) > MIN_IOU
    return point(reply.item.scene_id, found, len(boxes) == 1 and _padded_iou(boxes[0], reply.item) > MIN_IOU)


def _image_iou(box: Box, item: Item) -> float:
    return iou(_scaled(box, item.width, item.height), _target(item))


def _padded_iou(box: Box, item: Item) -> float:
    width, height = item.width, item.height
    side = max(width, height)
    x1, y1, x2, y2 = _target(item)
    pad_x, pad_y = (side - width) // 2, (side - height) // 2
    return iou(_scaled(box, side, side), (x1 + pad_x, y1 + pad_y, x2 + pad_x, y2 + pad_y))


def _target(item: Item) -> Box:
    [box] = item.boxes_xyxy_px
    return box


def _scaled(box: Sequence[float], width: int, height: int) -> Box:
    x1, y1, x2, y2 = box
    return (x1 * width, y1 * height, x2 * width, y2 * height)


def box_item(row: Row, category: str, question: str) -> Item:
    """An item of the layout that Visual-CoT gives its detection and RefCOCO files."""
    return Item(
        item_id=row.own_id,
        category=category,
        image=row.text("img_path"),
        question=question,
        boxes_xyxy_px=(row.box_xyxy_px("bbox"),),
        width=row.whole("width", 1),
        height=row.whole("height", 1),
    )
