"""Visual-CoT (https://huggingface.co/datasets/deepcs233/Visual-CoT): training and benchmark files, detection files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from sif_ray.datagen.annotations import Annotation
from sif_ray.datagen.source.fields import make_annotation, text
from sif_ray.datagen.source.refcoco import box_text, only_box
from sif_ray.method.profile import resolve

LAYOUTS = (("conversations", "image"), ("expression", "bbox", "img_path"))
"""Fields of a conversation of the training and benchmark files, and of a row of the detection files."""

BOX_REQUEST = " Please provide the bounding box coordinate of the region that can help you answer the question better."
_IMAGE_MARK = "<image>"
_BOX_MARK = "###"  # between the name of the picture and a box in its pixels
_BOX = re.compile(r"\[[^\[\]]*\]")


def to_annotation(row: Mapping[str, Any], stem: str, profile: str) -> Annotation:
    """A conversation, or a row of a detection file, whose dataset is the file's name.

    A conversation states its box twice: as fractions of the padded square with three decimals, which on large pages is
    off by several pixels, and in whole pixels behind the second name of the picture. The published profile takes the
    fractions, which the released code misreads; a profile that converts them takes the pixels where they are there.
    """
    if "conversations" not in row:
        return _detection(row, stem)
    turns = row["conversations"] if isinstance(row["conversations"], list) else []
    values = [text(turn.get("value")) if isinstance(turn, dict) else "" for turn in turns] + [""] * 4
    pictures = row["image"] if isinstance(row.get("image"), list) else [row.get("image")]
    names = [text(name) for name in pictures] + [""]
    fractions, pixels = _boxes(values[1]), _boxes(" ".join(name.partition(_BOX_MARK)[2] for name in names))
    in_pixels = bool(pixels) and (resolve(profile).converts_padded_square or not fractions)
    return make_annotation(
        row,
        dataset=text(row.get("dataset")) or stem,
        image=names[0].partition(_BOX_MARK)[0],
        question=values[0].removeprefix(_IMAGE_MARK).removesuffix(BOX_REQUEST),
        answer=values[3],
        boxes=pixels if in_pixels else fractions,
        frame="pixels" if in_pixels else "padded_square",
    )


def _detection(row: Mapping[str, Any], stem: str) -> Annotation:
    """A detection file has no answer but the box, so its question asks for the box."""
    question = text(row.get("expression"))
    return make_annotation(
        row,
        dataset=stem,
        image=row.get("img_path"),
        question=question and question + BOX_REQUEST,
        answer=box_text(row),
        boxes=only_box(row),
        frame="pixels",
    )


def _boxes(string: str) -> list[object]:
    """Every bracketed list in a string; what is no JSON stays as it is, and is no box."""
    return [_parsed(found) for found in _BOX.findall(string)]


def _parsed(string: str) -> object:
    try:
        return json.loads(string)
    except ValueError:
        return string
