"""Visual-CoT's benchmark: questions whose answers a judge scores, and the boxes of their evidence.

deepcs233/Visual-CoT, arXiv 2403.16999. Both halves are asked once: the answer and the last area are of one reply.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from sif_ray.evaluate.benchmarks import grounding
from sif_ray.evaluate.benchmarks.files import Row, read_rows
from sif_ray.evaluate.benchmarks.item import Benchmark, Item, Reply
from sif_ray.evaluate.measure import OVERALL, Measure, Point, Ratios, grouped, mean_of
from sif_ray.evaluate.replies import last_boxes
from sif_ray.method.trace import find_answer

GROUPS: dict[str, tuple[str, ...]] = {
    "Text": ("docvqa", "textcap", "textvqa", "dude", "sroie"),
    "Chart": ("infographicsvqa",),
    "General": ("flickr30k",),
    "Reasoning": ("gqa", "openimages", "vsr"),
    "Fine-grained": ("cub",),
}
"""The eleven official data sets. visual7w and emotic lie beside them and count for nothing."""

DATASETS = tuple(name for names in GROUPS.values() for name in names)

_IMAGE = "<image>\n"
_ASK_FOR_BOX = " Please provide the bounding box coordinate of the region that can help you answer the question better."
_OBTAIN = (
    "Put `viscot_benchmark` of huggingface.co/datasets/deepcs233/Visual-CoT anywhere: `benchmark/<set>.json` and "
    "`benchmark_det/<set>.jsonl`, a few MB (8,281 questions in eleven sets). The images are in `cot_images_tar_split` "
    "(143 GB, training images included) and keep their own terms."
)


def _read_questions(path: Path, answers: Path | None) -> Iterator[Item]:
    for row in read_rows(path):
        turns = row.value("conversations")
        if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns):
            raise row.error("conversations", "is not a list of turns {from, value}")
        question, answer = (_spoken(row, turns, index) for index in (0, -1))
        yield Item(
            item_id=row.own_id,
            category=row.text("dataset"),
            image=row.texts("image", 1)[0],
            question=question.removeprefix(_IMAGE).removesuffix(_ASK_FOR_BOX).strip(),
            answer=answer,
        )


def _spoken(row: Row, turns: Sequence[dict[str, object]], index: int) -> str:
    value = turns[index].get("value")
    if not isinstance(value, str) or not value.strip():
        raise row.error(f"conversations[{index}].value", f"is {value!r:.80}; expected a text")
    return value


def _read_boxes(path: Path, answers: Path | None) -> Iterator[Item]:
    for row in read_rows(path):
        yield grounding.box_item(row, category=path.stem, question=row.text("expression"))


def _over_datasets(name: str, points: dict[str, list[Point]]) -> Measure:
    """The mean over the official data sets that are there; without any of them, over what is there."""
    official = [dataset for dataset in DATASETS if dataset in points]
    totals = {OVERALL: mean_of(official or list(points))}
    for group, members in GROUPS.items():
        if present := [dataset for dataset in members if dataset in points]:
            totals[group] = mean_of(present)
    return Ratios(name, points, totals)


def _measure_answers(replies: Sequence[Reply]) -> list[Measure]:
    points = grouped((reply.item.category, _answer_point(reply)) for reply in replies)
    return [_over_datasets("judge score", points)]


def _answer_point(reply: Reply) -> Point:
    """Without a verdict there is nothing to count strictly; the released script makes it a 0."""
    score = reply.verdict or 0.0
    voided = len(last_boxes(reply.text)) > 1
    strict = (0.0, 0.0) if reply.verdict is None else (score, 1.0)
    return Point(reply.item.scene_id, strict, published=(0.0 if voided else score, 1.0))


def _measure_boxes(replies: Sequence[Reply]) -> list[Measure]:
    points = grouped((reply.item.category, grounding.box_point(reply)) for reply in replies)
    return [_over_datasets("IoU > 0.5", points)]


VISCOT = Benchmark(
    name="viscot",
    summary="Visual-CoT, questions: a judge's score, mean over eleven data sets",
    obtain=_OBTAIN,
    conventions=(
        "strict: what the judge did not score is left out and counted; published: it is 0, and so is every answer "
        "whose last area has several boxes"
    ),
    read=_read_questions,
    measure=_measure_answers,
    readable=lambda reply: find_answer(reply.text) is not None,
    files=tuple(f"{name}.json" for name in DATASETS),
    judged=True,
)

VISCOT_DET = Benchmark(
    name="viscot_det",
    summary="Visual-CoT, detection: IoU > 0.5 of the last area, mean over eleven data sets",
    obtain=_OBTAIN,
    conventions=grounding.CONVENTIONS,
    read=_read_boxes,
    measure=_measure_boxes,
    readable=grounding.has_box,
    files=tuple(f"{name}.jsonl" for name in DATASETS),
)
