"""SAT (arXiv 2412.07755): the first option that the answer contains must be the right one."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from sif_ray.evaluate.benchmarks.files import read_rows
from sif_ray.evaluate.benchmarks.item import Benchmark, Item, Reply
from sif_ray.evaluate.measure import Measure, Point, pooled
from sif_ray.method.trace import find_answer

_CHOICES = "\nChoices:\n"
_ANSWER_BLOCK = re.compile(r"<answer>.*?</answer>", re.DOTALL)


def _read(path: Path, answers: Path | None) -> Iterator[Item]:
    for row in read_rows(path):
        choices = row.texts("answers", 2)
        images = row.value("image_bytes")
        if not isinstance(images, list) or not images:
            raise row.error("image_bytes", "is not a list of at least one image")
        yield Item(
            item_id=row.own_id,
            category=str(row.fields.get("question_type") or "all"),
            image="",
            question=_asked(row.text("question").strip(), choices),
            answer=row.text("correct_answer").strip().lower(),
            choices=choices,
            num_images=len(images),
            picture=partial(row.picture, "image_bytes"),
        )


def _asked(question: str, choices: Sequence[str]) -> str:
    listed = "\n".join(f"- {choice}" for choice in choices)
    return f"{question}{_CHOICES}{listed}\nAnswer strictly with only one of the above options."


def _shuffled(item: Item, rng: random.Random) -> str:
    return _asked(item.question.rpartition(_CHOICES)[0], rng.sample(item.choices, len(item.choices)))


def _measure(replies: Sequence[Reply]) -> list[Measure]:
    return [pooled("accuracy", ((reply.item.category, _point(reply)) for reply in replies))]


def _point(reply: Reply) -> Point:
    """The released script asks nothing about several images, but counts them in its denominator."""
    item = reply.item
    if item.num_images > 1:
        return Point(item.scene_id, strict=(0.0, 0.0), published=(0.0, 1.0))
    text = reply.text.lower()
    strict = _is_right(item, find_answer(text) or "")
    # No answer block: the truth takes its place. A blank one is an answer that contains no option.
    published = strict if _ANSWER_BLOCK.search(text) else _is_right(item, item.answer)
    return Point(item.scene_id, (float(strict), 1.0), (float(published), 1.0))


def _is_right(item: Item, answer: str) -> bool:
    contained = (choice.lower() for choice in item.choices if choice.lower() in answer)
    return next(contained, None) == item.answer


SAT = Benchmark(
    name="sat",
    summary="SAT: spatial questions with listed options (the released script takes the split static)",
    obtain=(
        "Take the Parquet file of a split from huggingface.co/datasets/array/SAT (MIT): static has 127,000 questions "
        "and is documented as a training split, val 4,000 synthetic, test 150 real ones. Every file holds its images, "
        "and static is by far the largest."
    ),
    conventions=(
        "strict: of the questions about one image, a reply without an answer is wrong; published: it is right, and the "
        "questions about several images are wrong"
    ),
    read=_read,
    measure=_measure,
    readable=lambda reply: find_answer(reply.text.lower()) is not None,
    shuffled=_shuffled,
)
