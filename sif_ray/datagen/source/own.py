"""Annotations of one's own, JSON Lines or Parquet, in the layout that `sif-ray data convert` writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sif_ray.datagen.annotations import Annotation
from sif_ray.datagen.source.fields import make_annotation, text

LAYOUTS = (("question", "boxes", "image"),)


def to_annotation(row: Mapping[str, Any], stem: str, profile: str) -> Annotation:
    """`image, question, answer, boxes` (fractions of the image), and where known `id, dataset, width, height, split,
    question_type, names` (one per box) and `depth` (a picture of it). An id that is text is the sample's own: it must
    be unique among all datasets."""
    return make_annotation(
        row,
        dataset=text(row.get("dataset")) or stem,
        image=row.get("image"),
        question=row.get("question"),
        question_type=text(row.get("question_type")),
        answer=row.get("answer"),
        boxes=row.get("boxes"),
        frame="image",
        names=row.get("names"),
        depth=row.get("depth"),
        sample_id=text(row.get("id")) if isinstance(row.get("id"), str) else "",
    )
