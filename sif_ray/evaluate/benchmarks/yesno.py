"""Benchmarks whose questions are answered by yes or no: MME (arXiv 2306.13394) and POPE (arXiv 2305.10355).

Asked directly, without depth image and thinking; the questions are SpatialBot's `bunny_*.jsonl`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from sif_ray.config import ConfigError
from sif_ray.evaluate.benchmarks.files import read_rows
from sif_ray.evaluate.benchmarks.item import Benchmark, Item, Reply
from sif_ray.evaluate.benchmarks.labels import INLINE, label_of
from sif_ray.evaluate.measure import OVERALL, Measure, Point, Ratios, point, pooled
from sif_ray.evaluate.replies import plain_answer

Word = Literal["yes", "no"]

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

_WORD = re.compile(r"\w+")
_NEGATIONS = {"no", "not"}


def yes_or_no(answer: str) -> Word | None:
    """Strict: what the first sentence says; None for neither word or both."""
    words = set(_WORD.findall(re.split(r"[.!?\n]", answer.strip(), maxsplit=1)[0].casefold()))
    yes, no = "yes" in words, bool(words & _NEGATIONS)
    return None if yes == no else "yes" if yes else "no"


def _is_readable(reply: Reply) -> bool:
    return yes_or_no(plain_answer(reply.text)) is not None


# ----------------------------------------------------------------------------------------------------- MME


def _question_of(text: str) -> str:
    """A question without the words about the answer's form, which differ from file to file."""
    for form in ("Answer the question using a single word or phrase.", "Please answer yes or no."):
        text = text.replace(form, "")
    return " ".join(text.split())


def _mme_labels(folder: Path) -> dict[tuple[str, str, str], str]:
    """{(category, stem of the image, question): answer} of the folder `MME_Benchmark_release_version`."""
    labels = {}
    for path in sorted(folder.rglob("*.txt")):
        category = path.relative_to(folder).parts[0]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            question, tab, answer = line.rpartition("\t")
            if line.strip() and not tab:
                raise ConfigError(f"{path}, line {number}: {line!r:.80} is not a question, a tab and an answer")
            labels[category, path.stem, _question_of(question)] = answer.strip()
    return labels


def _read_mme(path: Path, answers: Path | None) -> Iterator[Item]:
    labels = _mme_labels(answers) if answers else {}
    for row in read_rows(path):
        image, text, category = row.text("image"), row.text("text"), row.one_of("category", PERCEPTION + COGNITION)
        label = label_of(row, labels.get((category, Path(image).stem, _question_of(text))), ("yes", "no", "Yes", "No"))
        yield Item(row.own_id, category, image, text, label.lower(), plain=True)


def _measure_mme(replies: Sequence[Reply]) -> list[Measure]:
    """Points of a category: 100 * (accuracy + share of images whose two questions are both right)."""
    pairs: dict[tuple[str, str], list[Reply]] = {}
    for reply in replies:
        pairs.setdefault((reply.item.category, reply.item.image), []).append(reply)
    points: dict[str, list[Point]] = {}
    for (category, image), pair in pairs.items():
        values = zip(*(_mme_right(reply) for reply in pair), strict=True)
        points.setdefault(category, []).append(
            point(image, *(100 * (sum(right) / len(pair) + all(right)) for right in values))
        )
    kinds = {
        kind: dict.fromkeys(present, 1.0)
        for kind, names in (("perception", PERCEPTION), ("cognition", COGNITION))
        if (present := [name for name in names if name in points])
    }
    return [Ratios("MME points", points, {OVERALL: dict.fromkeys(points, 1.0), **kinds})]


def _mme_right(reply: Reply) -> tuple[bool, bool]:
    """Strict and published; the released script looks for "yes", then "no", in the first four characters."""
    published = next((word for word in ("yes", "no") if word in reply.text.strip().lower()[:4]), "other")
    return yes_or_no(plain_answer(reply.text)) == reply.item.answer, published == reply.item.answer


MME_LABELS = "the folder MME_Benchmark_release_version (its .txt files)"

MME = Benchmark(
    name="mme",
    summary="MME: yes or no, accuracy and accuracy+ of 14 categories in points",
    obtain=(
        "Take `bunny_mme.jsonl` (2,374 questions) from the evaluation data of SpatialBot or Bunny. The images and "
        f"answers are gated: ask the authors of MME, and give {MME_LABELS} with --answers. {INLINE}"
    ),
    conventions="strict: the first sentence must say yes or no; published: the first four characters decide",
    read=_read_mme,
    measure=_measure_mme,
    readable=_is_readable,
    labels=MME_LABELS,
)


# ---------------------------------------------------------------------------------------------------- POPE


def _pope_labels(folder: Path) -> dict[tuple[str, str, str], str]:
    """{(category, image, question): label} of the files `coco_pope_<category>.json`."""
    return {
        (path.stem.removeprefix("coco_pope_"), row.text("image"), _question_of(row.text("text"))): row.text("label")
        for path in sorted(folder.glob("coco_pope_*.json"))
        for row in read_rows(path)
    }


def _read_pope(path: Path, answers: Path | None) -> Iterator[Item]:
    labels = _pope_labels(answers) if answers else {}
    for row in read_rows(path):
        image, text = row.text("image"), row.text("text")
        category = row.fields.get("category") or path.stem.removeprefix("coco_pope_")
        label = label_of(row, labels.get((category, image, _question_of(text))), ("yes", "no"))
        yield Item(row.own_id, category, image, text, label, plain=True)


def _measure_pope(replies: Sequence[Reply]) -> list[Measure]:
    said = [(reply.item, _pope_said(reply)) for reply in replies]
    accuracy = pooled(
        "accuracy",
        ((item.category, point(item.scene_id, *(word == item.answer for word in words))) for item, words in said),
    )
    f1 = pooled(
        "F1", ((item.category, Point(item.scene_id, *(_f1(item, word) for word in words))) for item, words in said)
    )
    yes = pooled(
        "yes ratio", ((item.category, point(item.scene_id, *(w == "yes" for w in words))) for item, words in said)
    )
    return [f1, accuracy, yes]


def _pope_said(reply: Reply) -> tuple[Word | None, Word]:
    """Strict and published; to the released script everything that is not "no" is "yes"."""
    words = reply.text.strip().split(".")[0].replace(",", "").split(" ")
    return yes_or_no(plain_answer(reply.text)), "no" if {"No", "not", "no"} & set(words) else "yes"


def _f1(item: Item, word: Word | None) -> tuple[float, float]:
    """What an answer adds to F1 = 2 TP / (2 TP + FP + FN); neither word is wrong."""
    if item.answer == "yes":
        return (2.0, 2.0) if word == "yes" else (0.0, 1.0)
    return (0.0, 0.0) if word == "no" else (0.0, 1.0)


POPE_LABELS = "the folder with coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json"

POPE = Benchmark(
    name="pope",
    summary="POPE: is there an object? F1, accuracy and share of yes",
    obtain=(
        "Take `bunny_pope_test.jsonl` (8,910 questions) from the evaluation data of SpatialBot or Bunny and give "
        f"{POPE_LABELS} (github.com/RUCAIBox/POPE) with --answers; the images are of COCO val2014 (6 GB). {INLINE}"
    ),
    conventions="strict: the first sentence must say yes or no; published: everything that is not no is yes",
    read=_read_pope,
    measure=_measure_pope,
    readable=_is_readable,
    labels=POPE_LABELS,
)
