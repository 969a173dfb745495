"""CV-Bench (Cambrian-1, arXiv 2406.16860): mean of 2D and 3D, where 2D is the mean of its two sources."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from sif_ray.evaluate.benchmarks.files import read_rows
from sif_ray.evaluate.benchmarks.item import Benchmark, Item, Reply
from sif_ray.evaluate.measure import OVERALL, Measure, Point, Ratios, grouped, mean_of, point
from sif_ray.evaluate.replies import option_letter, plain_answer
from sif_ray.method.trace import find_answer

SOURCES = {"2D": ("ADE20K", "COCO"), "3D": ("Omni3D",)}

_LETTER = re.compile(r"\(([A-Z])\)")


def _read(path: Path, answers: Path | None) -> Iterator[Item]:
    allowed = tuple(source for sources in SOURCES.values() for source in sources)
    for row in read_rows(path):
        letter = _LETTER.fullmatch(row.text("answer").strip())
        choices = row.texts("choices", 2)
        if letter is None or not 0 <= ord(letter[1]) - ord("A") < len(choices):
            raise row.error("answer", f'is {row.value("answer")!r}; expected the letter of a choice such as "(A)"')
        yield Item(
            item_id=row.own_id,
            category=row.one_of("source", allowed),
            image=str(row.fields.get("filename") or row.fields.get("source_filename") or ""),
            question=row.text("prompt"),
            answer=letter[1],
            choices=choices,
            task=row.text("task"),
            picture=partial(row.picture, "image"),
        )


def published_choice(text: str) -> str:
    """The official parser: the first character after the last "answer is" or "answer:"; the whole of a short answer."""
    answer = text.lower().strip()
    for marker in ("answer is", "answer:"):
        answer = answer.split(marker)[-1]
    answer = answer.strip().rstrip(".:,").lstrip("(").rstrip(")")
    return answer[:1] if len(answer) > 1 else answer


def _chosen(reply: Reply) -> str | None:
    return option_letter(find_answer(reply.text), reply.item.choices)


def _measure(replies: Sequence[Reply]) -> list[Measure]:
    points = [_point(reply) for reply in replies]
    by_source = grouped((reply.item.category, found) for reply, found in zip(replies, points, strict=True))
    by_task = grouped((reply.item.task, found) for reply, found in zip(replies, points, strict=True))
    halves = {
        half: mean_of(present)
        for half, sources in SOURCES.items()
        if (present := [source for source in sources if source in by_source])
    }
    overall = {source: weight / len(halves) for half in halves.values() for source, weight in half.items()}
    return [Ratios("accuracy", by_source, {OVERALL: overall, **halves}), Ratios("accuracy by task", by_task)]


def _point(reply: Reply) -> Point:
    item = reply.item
    right_choice = item.choices[ord(item.answer) - ord("A")]
    published = published_choice(plain_answer(reply.text)) in (item.answer.lower(), right_choice)
    return point(item.scene_id, _chosen(reply) == item.answer, published)


CVBENCH = Benchmark(
    name="cvbench",
    summary="CV-Bench: 1/2 * ((ADE20K + COCO) / 2 + Omni3D)",
    obtain=(
        "Take huggingface.co/datasets/nyu-visionx/CV-Bench (2,638 questions with their images, Apache-2.0): a file of "
        "it, Parquet or JSON lines, or the folder with test_2d.parquet and test_3d.parquet."
    ),
    conventions="strict: the answer must choose the letter; published: Cambrian's parser, the first character decides",
    read=_read,
    measure=_measure,
    readable=lambda reply: _chosen(reply) is not None,
    files=("test_2d.parquet", "test_3d.parquet"),
)
