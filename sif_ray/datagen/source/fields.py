"""From the fields of a file to an annotation, which has an error where they are missing or of another kind."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

from sif_ray.datagen.annotations import Annotation, Frame
from sif_ray.method.boxes import COORDINATE_LIMIT, BoxError, as_rectangle

_ID_KEYS = ("id", "question_id", "sent_id")
_HASH_BYTES = 8  # of an id that is made up


def make_annotation(
    row: Mapping[str, Any],
    *,
    dataset: str,
    image: object,
    question: object,
    question_type: str = "",
    answer: object,
    boxes: object,
    frame: Frame,
    names: object = (),
    depth: object = "",
    sample_id: str = "",
) -> Annotation:
    """An annotation from what a row holds, which may be anything.

    Its id is `sample_id`, or else `<dataset>-<the row's own id>`, where it has none a hash of image, question, answer
    and boxes. Its error is `image_missing`, `question_empty`, `boxes_missing`, `boxes_invalid` or `answer_empty`, the
    first that applies: text of another type counts as empty, boxes that are no lists of four finite numbers as invalid.
    """
    found, boxes_error = _boxes(boxes)
    content = (text(image), text(question), text(answer), found)
    return Annotation(
        sample_id=sample_id or f"{dataset}-{_own_id(row) or _hash(content)}",
        dataset=dataset,
        split=text(row.get("split")),
        image=content[0],
        question=content[1],
        question_type=question_type,
        answer=content[2],
        boxes=found,
        frame=frame,
        names=_names(names, len(found)),
        width=side_px(row.get("width")),
        height=side_px(row.get("height")),
        depth=text(depth),
        error=_error(*content[:3], boxes_error),
    )


def broken_annotation(sample_id: str, error: str) -> Annotation:
    """In the place of a row of which nothing can be told but where it stands."""
    return Annotation(
        sample_id=sample_id,
        dataset="",
        split="",
        image="",
        question="",
        question_type="",
        answer="",
        boxes=(),
        frame="image",
        error=error,
    )


def text(value: object) -> str:
    """`value` without white space around it; a number as its digits; "" for what is no text or cannot be stored."""
    if isinstance(value, str):
        return value.strip() if value.isascii() or _can_be_stored(value) else ""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    return ""


def _can_be_stored(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return False
    return True


def side_px(value: object) -> int:
    """A side of a picture in pixels; 0 for what is no whole positive number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= COORDINATE_LIMIT:
        return 0
    return int(value) if value == int(value) else 0


def _error(image: str, question: str, answer: str, boxes_error: str) -> str:
    if not image:
        return "image_missing"
    if not question:
        return "question_empty"
    return boxes_error or ("" if answer else "answer_empty")


def _boxes(value: object) -> tuple[tuple[tuple[float, ...], ...], str]:
    """The boxes and what is wrong with them."""
    if value is None or value == []:
        return (), "boxes_missing"
    if not isinstance(value, list):
        return (), "boxes_invalid"
    try:
        return tuple(as_rectangle(box) for box in value), ""
    except BoxError:
        return (), "boxes_invalid"


def _names(value: object, num_boxes: int) -> tuple[str, ...]:
    """One for each box; none at all where one is missing."""
    names = tuple(text(name) for name in value) if isinstance(value, list | tuple) else ()
    return names if len(names) == num_boxes and all(names) else ()


def _own_id(row: Mapping[str, Any]) -> str:
    return next((name for key in _ID_KEYS if (name := text(row.get(key)))), "")


def _hash(content: tuple[object, ...]) -> str:
    return hashlib.blake2b(repr(content).encode(), digest_size=_HASH_BYTES).hexdigest()
