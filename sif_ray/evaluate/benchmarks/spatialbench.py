"""SpatialBench (SpatialBot, arXiv 2406.13642): five categories, some of them scored in pairs of questions.

A reply that holds the truth as a part of it is right; counting scores 1 - |n - truth| / truth. In existence, reach and
size two questions that follow each other in the file are a pair about one thing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from sif_ray.config import ConfigError
from sif_ray.evaluate.benchmarks.files import Row, read_rows
from sif_ray.evaluate.benchmarks.item import Benchmark, Item, Reply
from sif_ray.evaluate.measure import OVERALL, Measure, Point, Ratios, mean_of, point
from sif_ray.method.trace import find_answer

CATEGORIES = ("positional", "existence", "counting", "reach", "size")
PAIRED = ("existence", "reach", "size")


def _read(path: Path, answers: Path | None) -> Iterator[Item]:
    if path.stem not in CATEGORIES:
        wanted = ", ".join(f"{category}.json" for category in CATEGORIES)
        raise ConfigError(f"{path}: the file's name says the category; expected one of {wanted}")
    for row in read_rows(path):
        yield Item(
            item_id=row.own_id,
            category=path.stem,
            image=_image(row),
            question=row.text("question").strip(),
            answer=str(row.whole("answer", 1)) if path.stem == "counting" else row.text("answer"),
        )
    if path.stem in PAIRED and row.position % 2 == 0:
        raise ConfigError(
            f"{path}, {row.place}: two rows that follow each other are a pair; this last one has no second"
        )


def _image(row: Row) -> str:
    return row.texts("image", 1)[0] if isinstance(row.value("image"), list) else row.text("image")


def _measure(replies: Sequence[Reply]) -> list[Measure]:
    by_category: dict[str, list[Reply]] = {}
    for reply in replies:
        by_category.setdefault(reply.item.category, []).append(reply)
    points: dict[str, Sequence[Point]] = {}
    for category, of_category in by_category.items():
        if category in PAIRED:
            pairs = zip(of_category[0::2], of_category[1::2], strict=True)
            points[category] = [_pair_point(first, second) for first, second in pairs]
        else:
            points[category] = [point(reply.item.scene_id, *_scores(reply)) for reply in of_category]
    return [Ratios("score", points, {OVERALL: mean_of(list(points))})]


def _pair_point(first: Reply, second: Reply) -> Point:
    """Existence: both are right. Reach and size: a third each for the one, the other and both."""
    values = []
    for a, b in zip(_scores(first), _scores(second), strict=True):
        values.append(a * b if first.item.category == "existence" else (a + b + a * b) / 3)
    return point(first.item.scene_id, *values)


def _scores(reply: Reply) -> tuple[float, float]:
    """Strict and published. The released script puts the truth where no answer can be read."""
    answer, truth = find_answer(reply.text), reply.item.answer
    if answer is None:
        return 0.0, 1.0
    score = _count_score(answer, int(truth)) if reply.item.category == "counting" else float(truth in answer)
    return score, score


def _count_score(answer: str, truth: int) -> float:
    """At most 1, negative beyond twice the truth; 0 for an answer that is no whole number."""
    try:
        return 1 - abs(int(answer) - truth) / truth
    except ValueError:
        return 0.0


SPATIALBENCH = Benchmark(
    name="spatialbench",
    summary="SpatialBench: positional, existence, counting, reach, size, and their mean",
    obtain=(
        "Put `<category>.json` and its folder of images from huggingface.co/datasets/RussRobin/SpatialBench into one "
        "folder (120 images, CC-BY-4.0). It is gated: log in there and agree to share your contact."
    ),
    conventions="strict: a reply without an answer is wrong; published: it is right",
    read=_read,
    measure=_measure,
    readable=lambda reply: find_answer(reply.text) is not None,
    files=tuple(f"{category}.json" for category in CATEGORIES),
)
