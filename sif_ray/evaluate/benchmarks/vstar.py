"""V* Bench (arXiv 2312.14135): small things in large photographs, with lettered options."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from sif_ray.evaluate.benchmarks.files import read_rows
from sif_ray.evaluate.benchmarks.item import Benchmark, Item, Reply
from sif_ray.evaluate.measure import Measure, Point, point, pooled
from sif_ray.evaluate.replies import option_letter
from sif_ray.judge.exact import lettered_options
from sif_ray.method.trace import find_answer

CATEGORIES = ("direct_attributes", "relative_position")
_LETTERS = ("A", "B", "C", "D")


def _read(path: Path, answers: Path | None) -> Iterator[Item]:
    for row in read_rows(path):
        text = row.text("text")
        yield Item(
            item_id=row.own_id,
            category=row.one_of("category", CATEGORIES),
            image=row.text("image"),
            question=text,
            answer=row.one_of("label", _LETTERS),
            choices=tuple(lettered_options(text).values()) or _LETTERS,
        )


def _chosen(reply: Reply) -> str | None:
    return option_letter(find_answer(reply.text), reply.item.choices)


def _measure(replies: Sequence[Reply]) -> list[Measure]:
    return [pooled("accuracy", ((reply.item.category, _point(reply)) for reply in replies))]


def _point(reply: Reply) -> Point:
    item = reply.item
    published = item.answer in (find_answer(reply.text) or "")
    return point(item.scene_id, _chosen(reply) == item.answer, published)


VSTAR = Benchmark(
    name="vstar",
    summary="V* Bench: lettered options about small things, in two categories",
    obtain=(
        "Take `test_questions.jsonl` and its two folders of images from huggingface.co/datasets/craigwu/vstar_bench "
        "(191 questions; the card states no licence)."
    ),
    conventions="strict: the answer must choose the letter; published: the letter stands anywhere in the answer",
    read=_read,
    measure=_measure,
    readable=lambda reply: _chosen(reply) is not None,
)
