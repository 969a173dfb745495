"""TallyQA with boxes, as GRIT lays it out: `question, answer, image, width, height, bboxs (pixels), dataset, split`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sif_ray.datagen.annotations import Annotation
from sif_ray.datagen.source.fields import make_annotation, text

LAYOUTS = (("bboxs", "question", "image"),)


def to_annotation(row: Mapping[str, Any], stem: str, profile: str) -> Annotation:
    """A counting question with a box for everything that is counted."""
    return make_annotation(
        row,
        dataset=text(row.get("dataset")) or stem,
        image=row.get("image"),
        question=row.get("question"),
        question_type="count",
        answer=row.get("answer"),
        boxes=row.get("bboxs"),
        frame="pixels",
    )
