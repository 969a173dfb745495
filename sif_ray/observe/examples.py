"""Held-out items worth looking at, with every look of the policy ready to be drawn."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from sif_ray.config import QuickstartConfig
from sif_ray.method.boxes import Box, is_box
from sif_ray.method.depth_code import box_mean, decode
from sif_ray.method.trace import find_answer, parse
from sif_ray.observe.run_files import RunFiles
from sif_ray.records import Sample

GOOD_IOU = 0.5
NUM_WRONG = 2
MAX_SIDE_PX = 448  # of an image inside the report
RULE = (
    f"Chosen by rule, not by eye: of each question type the first held-out item answered right with a last-box IoU of "
    f"at least {GOOD_IOU:g}, then the first {NUM_WRONG} items answered wrong; each from another scene."
)


@dataclass(frozen=True)
class Rectangle:
    """A box in per mille of the image, and its depth as the policy states it and as the depth map has it."""

    x: float
    y: float
    width: float
    height: float
    stated_depth: float | None = None
    map_depth: float | None = None


@dataclass(frozen=True)
class Look:
    """One step of a trace."""

    title: str
    rectangles: list[Rectangle]
    text: str


@dataclass(frozen=True)
class Example:
    """One question with what the policy looked at."""

    key: str  # names its two pictures in the page
    photo: str  # data URI
    depth: str  # data URI
    aspect: float  # width / height
    question: str
    question_type: str
    truth: str
    truth_boxes: list[Rectangle]
    looks: list[Look]
    text: str  # as it was generated
    answer: str
    right: bool
    iou_last: float | None
    answer_before: str | None = None
    right_before: bool | None = None
    iou_before: float | None = None


def examples(run: RunFiles) -> list[Example]:
    """Greedy answers of the policy after GRPO by `RULE`, right ones first."""
    if run.compared is None:
        return []
    before, after = run.compared
    greedy = [item for item in run.items if item["arm"] == "greedy"]
    earlier = {item["sample_id"]: item for item in greedy if item["checkpoint"] == before}
    chosen = choose([item for item in greedy if item["checkpoint"] == after])
    samples = run.samples([item["sample_id"] for item in chosen])
    assert isinstance(run.config, QuickstartConfig)  # a GRPO run alone compares nothing
    profile = run.config.evaluate.profile
    return [
        _example(f"item-{number}", samples[item["sample_id"]], item, earlier.get(item["sample_id"]), profile)
        for number, item in enumerate(chosen)
    ]


def choose(items: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The items that `RULE` names, of those whose text is a trace."""
    readable = [item for item in items if item["format"] == 1.0]
    chosen: list[Mapping[str, Any]] = []

    def take(candidates: Sequence[Mapping[str, Any]]) -> None:
        scenes = {item["scene_id"] for item in chosen}
        chosen.extend([item for item in candidates if item["scene_id"] not in scenes][:1])

    for kind in dict.fromkeys(item["question_type"] for item in readable):
        of_type = [item for item in readable if item["question_type"] == kind]
        take([item for item in of_type if is_right(item) and item["iou_last"] >= GOOD_IOU])
    for _ in range(NUM_WRONG):
        take([item for item in readable if not is_right(item)])
    return chosen


def is_right(item: Mapping[str, Any]) -> bool:
    """Whether the judge took the answer."""
    return bool(item["answer"] >= 0.5)


def _example(
    key: str, sample: Sample, item: Mapping[str, Any], earlier: Mapping[str, Any] | None, profile: str
) -> Example:
    depth_rel = decode(np.asarray(Image.open(io.BytesIO(sample.depth_image)).convert("RGB")))
    trace = parse(item["text"], profile)
    steps = [([(box.bbox_2d, box.depth) for box in step.boxes], step.text) for step in trace.steps]
    return Example(
        key=key,
        photo=data_uri(sample.image),
        depth=data_uri(sample.depth_image),
        aspect=sample.width / sample.height,
        question=sample.question,
        question_type=sample.question_type,
        truth=sample.answer,
        truth_boxes=[_rectangle(box) for box in sample.boxes],
        looks=_looks(steps, depth_rel),
        text=item["text"],
        answer=trace.answer,
        right=is_right(item),
        iou_last=item["iou_last"],
        answer_before=None if earlier is None else find_answer(earlier["text"]) or "no answer",
        right_before=None if earlier is None else is_right(earlier),
        iou_before=None if earlier is None else earlier["iou_last"],
    )


def served_example(record: Mapping[str, Any]) -> Example:
    """The request and the reply of serve/response.json."""
    response = record["response"]
    photo, depth = base64.b64decode(record["image"]), base64.b64decode(response["depth_image"])
    depth_picture = Image.open(io.BytesIO(depth)).convert("RGB")
    steps = [
        ([(tuple(box["bbox_xyxy_norm"]), box["depth"]) for box in step["boxes"]], step["text"])
        for step in response["steps"]
    ]
    answer = response["answer"] or "no answer"
    return Example(
        key="served",
        photo=data_uri(photo),
        depth=data_uri(depth),
        aspect=depth_picture.width / depth_picture.height,
        question=record["question"],
        question_type="",
        truth=record["truth"],
        truth_boxes=[_rectangle(box) for box in record["truth_boxes"]],
        looks=_looks(steps, decode(np.asarray(depth_picture))),
        text=response["text"],
        answer=answer,
        right=answer.strip().casefold() == record["truth"].strip().casefold(),
        iou_last=None,
    )


def _looks(
    steps: Sequence[tuple[Sequence[tuple[Box, float | None]], str]], depth_rel: npt.NDArray[np.float64]
) -> list[Look]:
    looks = []
    for number, (boxes, text) in enumerate(steps):
        rectangles = [
            _rectangle(box, stated, box_mean(depth_rel, box) if is_box(box) else None) for box, stated in boxes
        ]
        if [box for box, _ in boxes] == [(0.0, 0.0, 1.0, 1.0)]:
            title = "whole image"
        else:
            title = "last look" if number == len(steps) - 1 else f"look {number + 1}"
        looks.append(Look(title, rectangles, text))
    return looks


def _rectangle(box: Sequence[float], stated: float | None = None, in_map: float | None = None) -> Rectangle:
    x1, y1, x2, y2 = (round(1000 * value, 1) for value in box)
    return Rectangle(x1, y1, round(x2 - x1, 1), round(y2 - y1, 1), stated, in_map)


def data_uri(encoded: bytes, shrunk_as: Literal["PNG", "JPEG"] = "PNG") -> str:
    """The picture inside a URI, shrunk to `MAX_SIDE_PX` where it is larger; a PNG that is not stays as it is."""
    original = Image.open(io.BytesIO(encoded))
    kind = "PNG"
    if original.format != "PNG" or max(original.size) > MAX_SIDE_PX:
        picture = original.convert("RGB")
        picture.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX))
        buffer = io.BytesIO()
        picture.save(buffer, shrunk_as, quality=88)
        encoded, kind = buffer.getvalue(), shrunk_as
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded).decode('ascii')}"
