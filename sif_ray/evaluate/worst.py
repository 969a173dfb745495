"""The items that a policy did worst on, with their photographs, to be looked at."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from PIL import Image

from sif_ray.evaluate.benchmarks.item import Benchmark, Item, Reply
from sif_ray.evaluate.measure import OVERALL, sample_all
from sif_ray.evaluate.question import Key
from sif_ray.evaluate.replies import last_boxes, plain_answer
from sif_ray.evaluate.task import BenchmarkTask
from sif_ray.method.boxes import Box, is_box
from sif_ray.observe.examples import data_uri
from sif_ray.records import Sample

NUM_WORST = 6  # of a task
MAX_LOOKED_AT = 1000  # items, evenly over the file: of some benchmarks a single one takes long to score


@dataclass(frozen=True)
class Said:
    """What one policy said: `boxes` are those it ended on, in per mille of the image (x, y, width, height)."""

    policy: str
    answer: str
    text: str
    score: float
    boxes: list[tuple[float, float, float, float]]


@dataclass(frozen=True)
class WorstItem:
    """An item with its photograph and what the policies said, the one it was chosen for last."""

    item_id: str
    category: str
    question: str
    truth: str
    truth_boxes: list[tuple[float, float, float, float]]
    photo: str  # data URI; "" where the photograph could not be read
    aspect: float  # width / height
    said: list[Said]


def item_score(benchmark: Benchmark, reply: Reply) -> float:
    """The strict headline score of one reply. Twice the same one stands for a pair, where pairs are scored; what counts
    for nothing is no mistake."""
    found = sample_all(benchmark.measure([reply, reply])[0], 1, 0)["strict"][OVERALL]
    return found.value if found.n else 1.0


def worst_of_benchmark(task: BenchmarkTask, replies: Mapping[str, Sequence[Reply]]) -> list[WorstItem]:
    """Those of the last policy's greedy `replies` that said something; none where it made no mistake."""
    *_, last = replies
    looked_at = range(0, len(task.items), 1 + len(task.items) // MAX_LOOKED_AT)
    scores = {
        index: item_score(task.benchmark, replies[last][index]) for index in looked_at if replies[last][index].text
    }
    wrong = [index for index, value in scores.items() if value < 1.0]
    chosen = _spread(wrong, scores, {index: task.items[index].category for index in wrong})
    photos = _photos(task, [task.items[index].item_id for index in chosen])
    return [
        _worst(
            task.items[index],
            photos.get(task.items[index].item_id, b""),
            [
                _said(name, of_policy[index].text, item_score(task.benchmark, of_policy[index]))
                for name, of_policy in replies.items()
            ],
        )
        for index in chosen
    ]


def worst_of_samples(samples: Sequence[Sample], items: Sequence[Mapping[str, object]]) -> list[WorstItem]:
    """Those of the last policy's greedy answers to held-out samples, by their total score (`heldout.items`)."""
    greedy = [item for item in items if item["arm"] == "greedy"]
    last = [item for item in greedy if item["checkpoint"] == greedy[-1]["checkpoint"]]
    scores = {n: float(str(item["answer"])) + float(str(item["iou_last"])) for n, item in enumerate(last)}
    chosen = _spread(list(scores), scores, {n: str(item["question_type"]) for n, item in enumerate(last)})
    by_id = {sample.sample_id: sample for sample in samples}
    found = []
    for index in chosen:
        sample = by_id[str(last[index]["sample_id"])]
        said = [
            _said(str(item["checkpoint"]), str(item["text"]), float(str(item["answer"])))
            for item in greedy
            if item["sample_id"] == sample.sample_id
        ]
        found.append(
            WorstItem(
                sample.sample_id,
                sample.question_type,
                sample.question,
                sample.answer,
                [_per_mille(box) for box in sample.boxes],
                data_uri(sample.image),
                sample.width / sample.height,
                said,
            )
        )
    return found


def _spread(indices: Sequence[int], scores: Mapping[int, float], categories: Mapping[int, str]) -> list[int]:
    """The lowest scores, taken from every category in turn."""
    by_category: dict[str, list[int]] = {}
    for index in sorted(indices, key=lambda index: scores[index]):
        by_category.setdefault(categories[index], []).append(index)
    turns = zip_longest(*by_category.values())
    return [index for turn in turns for index in turn if index is not None][:NUM_WORST]


def _photos(task: BenchmarkTask, ids: Sequence[str]) -> dict[str, bytes]:
    wanted = {Key(task.name, "greedy", 0, item_id) for item_id in ids}
    return {asked.item_id: asked.photo for asked in task.questions(wanted)} if ids else {}


def _worst(item: Item, photo: bytes, said: list[Said]) -> WorstItem:
    width, height = _size(photo) if photo else (max(item.width, 1), max(item.height, 1))
    boxes = [_per_mille((x1 / width, y1 / height, x2 / width, y2 / height)) for x1, y1, x2, y2 in item.boxes_xyxy_px]
    truth = item.answer or ", ".join(item.answers[:3]) or ", ".join(item.box_labels)
    return WorstItem(
        item.item_id, item.category, item.question, truth, boxes, data_uri(photo, "JPEG") if photo else "",
        width / height, said,
    )  # fmt: skip


def _size(photo: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(photo)) as image:
        return image.size


def _said(policy: str, text: str, score: float) -> Said:
    boxes = [_per_mille(box) for box in last_boxes(text) if is_box(box)]
    return Said(policy, plain_answer(text) or "nothing", text, score, boxes)


def _per_mille(box: Box) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (1000 * value for value in box)
    return round(x1, 1), round(y1, 1), round(x2 - x1, 1), round(y2 - y1, 1)
