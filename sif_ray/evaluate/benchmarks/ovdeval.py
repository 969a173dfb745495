"""OVDEval (arXiv 2308.13177): detect what is named, among names of what is not there; scored by NMS-AP."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sif_ray.config import ConfigError
from sif_ray.evaluate.benchmarks.files import Row, load_object, object_rows
from sif_ray.evaluate.benchmarks.item import Benchmark, Item, Reply
from sif_ray.evaluate.measure import CONVENTIONS, OVERALL, Convention, Measure, mean_of
from sif_ray.evaluate.nms_ap import DetectionMatches, LabelledBox, MeanAveragePrecision, match, suppress
from sif_ray.evaluate.replies import json_list, plain_answer
from sif_ray.method.boxes import Box, BoxError, as_rectangle

ASPECTS: dict[str, tuple[str, ...]] = {
    "proper noun": ("celebrity", "logo", "landmark"),
    "attribute": ("color", "material"),
    "position": ("position",),
    "relationship": ("relationship",),
    "negation": ("negation",),
}
"""The published average is the mean of these five, each the mean of its files."""

FILES = tuple(name for names in ASPECTS.values() for name in names)

_ASK = (
    "Please carefully check the image and detect the following objects: {labels}. Answer with a JSON list of "
    '{{"bbox_2d": [x1, y1, x2, y2], "label": "name"}} with normalized coordinates, and with an empty list if there are '
    "none."
)


def _read(path: Path, answers: Path | None) -> Iterator[Item]:
    """One item per image. Raises `ConfigError`."""
    content = load_object(path)
    names = {row.value("id"): row.text("name") for row in object_rows(path, content, "categories")}
    truths: dict[Any, list[tuple[str, Box]]] = {}
    for row in object_rows(path, content, "annotations"):
        if row.value("category_id") not in names:
            raise row.error("category_id", f"is {row.value('category_id')!r}, which no category has")
        truths.setdefault(row.value("image_id"), []).append((names[row.value("category_id")], _box_xywh_px(row)))
    for row in object_rows(path, content, "images"):
        of_image = truths.pop(row.value("id"), [])
        labels = (*row.texts("text", 0), *(row.texts("neg_text", 0) if row.has("neg_text") else ()))
        yield Item(
            item_id=row.own_id,
            category=path.stem,
            image=row.text("file_name"),
            question=_ASK.format(labels=json.dumps(labels, ensure_ascii=False)),
            labels=labels,
            boxes_xyxy_px=tuple(box for _, box in of_image),
            box_labels=tuple(label for label, _ in of_image),
            width=row.whole("width", 1),
            height=row.whole("height", 1),
        )
    if truths:
        raise ConfigError(f"{path}: field 'annotations' names images that are not there, e.g. {next(iter(truths))!r}")


def _box_xywh_px(row: Row) -> Box:
    try:
        x, y, width, height = as_rectangle(row.value("bbox"))
    except BoxError as error:
        raise row.error("bbox", f"is no box: {error}") from error
    if width <= 0 or height <= 0:
        raise row.error("bbox", f"is {row.value('bbox')}; expected [x, y, width, height] with positive sizes")
    return (x, y, x + width, y + height)


def detections(reply: Reply) -> list[tuple[str, Box]] | None:
    """Labels and boxes in pixels of the list that a reply ends on; None where there is none.

    Entries that are no box with a label are left out. Boxes are fractions of the image, or pixels where any number of
    the reply is above 2: a policy may write 1.002.
    """
    listed = json_list(plain_answer(reply.text))
    if listed is None:
        return None
    found = [entry for entry in map(_entry, listed) if entry]
    in_pixels = any(number > 2 for _, box in found for number in box)
    width, height = (1, 1) if in_pixels else (reply.item.width, reply.item.height)
    return [(label, (x1 * width, y1 * height, x2 * width, y2 * height)) for label, (x1, y1, x2, y2) in found]


def _entry(value: object) -> tuple[str, Box] | None:
    if not isinstance(value, dict) or not isinstance(value.get("label"), str):
        return None
    try:
        x1, y1, x2, y2 = box = as_rectangle(value.get("bbox_2d"))
    except BoxError:
        return None
    return (value["label"].strip().casefold(), box) if x1 < x2 and y1 < y2 else None


def _measure(replies: Sequence[Reply]) -> list[Measure]:
    by_file: dict[str, list[Reply]] = {}
    for reply in replies:
        by_file.setdefault(reply.item.category, []).append(reply)
    groups = {
        name: {convention: _matches(of_file, convention) for convention in CONVENTIONS}
        for name, of_file in by_file.items()
    }
    aspects = {
        aspect: mean_of(present)
        for aspect, names in ASPECTS.items()
        if (present := [name for name in names if name in by_file])
    } or {name: {name: 1.0} for name in by_file}
    overall = {name: weight / len(aspects) for weights in aspects.values() for name, weight in weights.items()}
    broad = {aspect: weights for aspect, weights in aspects.items() if aspect not in by_file}
    return [MeanAveragePrecision("NMS-AP", groups, {OVERALL: overall, **broad})]


def _matches(replies: Sequence[Reply], convention: Convention) -> DetectionMatches:
    truths: list[LabelledBox] = []
    kept: list[LabelledBox] = []
    for image, reply in enumerate(replies):
        item = reply.item
        true_boxes = zip(item.box_labels, item.boxes_xyxy_px, strict=True)
        truths += [LabelledBox(image, label.strip().casefold(), box) for label, box in true_boxes]
        given = [LabelledBox(image, label, box) for label, box in detections(reply) or []]
        kept += suppress(given, item.boxes_xyxy_px, last_wins=convention == "published")
    return match(len(replies), truths, kept)


OVDEVAL = Benchmark(
    name="ovdeval",
    summary="OVDEval: NMS-AP of eight files, mean over five aspects",
    obtain=(
        "Put `annotations/<aspect>.json` of huggingface.co/datasets/omlab/OVDEval (openrail) into one folder: "
        "celebrity, logo, landmark, color, material, position, relationship, negation. The images are in a folder "
        "of their own, one below it for each."
    ),
    conventions=(
        "strict: of detections that compete for a true box the first written stays; published: the last, as the "
        "official script sorts equal scores"
    ),
    read=_read,
    measure=_measure,
    readable=lambda reply: detections(reply) is not None,
    files=tuple(f"{name}.json" for name in FILES),
)
