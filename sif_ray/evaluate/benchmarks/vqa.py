"""Open questions with short answers: VQAv2 (arXiv 1612.00837) and GQA (arXiv 1902.09506).

Asked directly, without depth image and thinking; the questions are SpatialBot's `bunny_*.jsonl`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ijson

from sif_ray.config import ConfigError
from sif_ray.datagen.source.rows import BROKEN_JSON
from sif_ray.evaluate.benchmarks.files import Row, load_object, read_rows
from sif_ray.evaluate.benchmarks.item import Benchmark, Item, Reply
from sif_ray.evaluate.benchmarks.labels import INLINE, label_of
from sif_ray.evaluate.measure import Measure, point, pooled
from sif_ray.evaluate.replies import plain_answer
from sif_ray.evaluate.vqa_text import normal, vqa_accuracy

# --------------------------------------------------------------------------------------------------- VQAv2

VQAV2_LABELS = "the file v2_mscoco_val2014_annotations.json (visualqa.org)"


def _vqa_labels(path: Path) -> dict[str, tuple[list[Any], str]]:
    """{question id: (answers of the people, type of answer)}, streamed: the file has hundreds of megabytes."""
    try:
        with path.open("rb") as file:
            rows = ijson.items(file, "annotations.item")
            return {str(row["question_id"]): (row["answers"], row.get("answer_type", "")) for row in rows}
    except (OSError, *BROKEN_JSON, KeyError, TypeError) as error:
        raise ConfigError(f"--answers {path}: {error!r}; expected {VQAV2_LABELS}") from error


def _read_vqav2(path: Path, answers: Path | None) -> Iterator[Item]:
    labels = _vqa_labels(answers) if answers else {}
    for row in read_rows(path):
        given, kind = (row.fields["answers"], "") if row.has("answers") else labels.get(row.own_id, (None, ""))
        yield Item(
            row.own_id,
            kind or row.fields.get("category") or "default",
            row.text("image"),
            row.text("text"),
            answers=() if given is None else _people(row, given),
            plain=True,
        )


def _people(row: Row, given: object) -> tuple[str, ...]:
    """Answers as texts or, as in the official file, objects with the key "answer"."""
    found: list[Any] = (
        [one.get("answer") if isinstance(one, dict) else one for one in given] if isinstance(given, list) else []
    )
    if len(found) < 2 or not all(isinstance(one, str) for one in found):
        raise row.error("answers", f"is {given!r:.80}; expected the answers of ten people")
    return tuple(found)


def _measure_vqav2(replies: Sequence[Reply]) -> list[Measure]:
    return [
        pooled(
            "accuracy", ((reply.item.category, point(reply.item.scene_id, *_vqa_scores(reply))) for reply in replies)
        )
    ]


def _vqa_scores(reply: Reply) -> Iterable[float]:
    return (vqa_accuracy(text, reply.item.answers) for text in (plain_answer(reply.text), reply.text))


VQAV2 = Benchmark(
    name="vqav2",
    summary="VQAv2: agreement with ten people",
    obtain=(
        "Take a `bunny_vqav2_*.jsonl` of the evaluation data of SpatialBot or Bunny, or any file with its fields. "
        "Test-dev (107,394 questions) has no public answers: convert the predictions and hand them to the server of "
        f"visualqa.org. For val2014 give {VQAV2_LABELS} with --answers; images of COCO (val2014 6 GB, test2015 12 GB). "
        "A question file may also hold the ten answers itself, as the field answers."
    ),
    conventions="strict: an answer block counts where there is one; published: the whole text",
    read=_read_vqav2,
    measure=_measure_vqav2,
    readable=lambda reply: bool(normal(plain_answer(reply.text))),
    labels=VQAV2_LABELS,
)

# ----------------------------------------------------------------------------------------------------- GQA

GQA_LABELS = "the file testdev_balanced_questions.json (downloads of GQA, in questions1.2.zip)"


def _read_gqa(path: Path, answers: Path | None) -> Iterator[Item]:
    labels = load_object(answers) if answers else {}
    for row in read_rows(path):
        question = labels.get(row.own_id, {})
        label = label_of(row, question.get("answer"))
        category = question.get("types", {}).get("structural") or row.fields.get("category") or "default"
        yield Item(row.own_id, category, row.text("image"), row.text("text"), label, plain=True)


def _measure_gqa(replies: Sequence[Reply]) -> list[Measure]:
    return [
        pooled("accuracy", ((reply.item.category, point(reply.item.scene_id, *_gqa_right(reply))) for reply in replies))
    ]


def _gqa_right(reply: Reply) -> Iterable[bool]:
    texts = (plain_answer(reply.text), reply.text.strip())
    return (text.rstrip(".").lower() == reply.item.answer.lower() for text in texts)


GQA = Benchmark(
    name="gqa",
    summary="GQA test-dev balanced: the answer word by word",
    obtain=(
        "Take `bunny_gqa_testdev_balanced.jsonl` (12,578 questions) of the evaluation data of SpatialBot or Bunny and "
        f"give {GQA_LABELS} with --answers; images: 20 GB from the same page. {INLINE}"
    ),
    conventions="strict: an answer block counts where there is one; published: the whole text",
    read=_read_gqa,
    measure=_measure_gqa,
    readable=lambda reply: bool(plain_answer(reply.text)),
    labels=GQA_LABELS,
)
