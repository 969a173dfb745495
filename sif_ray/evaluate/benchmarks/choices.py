"""Questions with lettered options, asked directly: MMBench (arXiv 2307.06281), SEED-Bench (arXiv 2307.16125)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from sif_ray.evaluate.benchmarks.files import load_object, object_rows, read_rows
from sif_ray.evaluate.benchmarks.item import Benchmark, Item, Reply
from sif_ray.evaluate.benchmarks.labels import INLINE, label_of
from sif_ray.evaluate.measure import Measure, Point, point, pooled
from sif_ray.evaluate.replies import option_letter, plain_answer
from sif_ray.judge.exact import lettered_options

LETTERS = ("A", "B", "C", "D")
_ASK = "Answer with the option's letter from the given choices directly."
_CONVENTIONS = "strict: the answer must choose the letter; published: the text must be the letter and nothing else"


def _chosen(reply: Reply) -> str | None:
    return option_letter(plain_answer(reply.text), reply.item.choices)


def _is_readable(reply: Reply) -> bool:
    return _chosen(reply) is not None


def _measure(replies: Sequence[Reply]) -> list[Measure]:
    return [pooled("accuracy", ((reply.item.category, _point(reply)) for reply in replies))]


def _point(reply: Reply) -> Point:
    item = reply.item
    return point(item.scene_id, _chosen(reply) == item.answer, reply.text.strip() == item.answer)


def _read_mmbench(path: Path, answers: Path | None) -> Iterator[Item]:
    for row in read_rows(path):
        choices = [row.fields[letter] for letter in LETTERS if row.has(letter)]
        hint = [row.text("hint")] if row.has("hint") and row.text("hint") != "nan" else []
        options = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
        yield Item(
            item_id=row.own_id,
            category=row.fields.get("category") or "all",
            image="",
            question="\n".join([*hint, row.text("question"), *options, _ASK]),
            answer=label_of(row, None, LETTERS[: len(choices)]),
            choices=tuple(choices),
            plain=True,
            picture=partial(row.picture, "image"),
        )


MMBENCH = Benchmark(
    name="mmbench",
    summary="MMBench: lettered options, single round",
    obtain=(
        "Take a .tsv of MMBench (github.com/open-compass/MMBench), images included, with the column answer: "
        "MMBench_DEV_EN. The released script runs MMBench_TEST_EN_legacy, whose answers are not public: "
        "hand predictions on it to the server of MMBench."
    ),
    conventions=f"{_CONVENTIONS} (the server of MMBench asks an LLM which option a text means)",
    read=_read_mmbench,
    measure=_measure,
    readable=_is_readable,
)

SEED_LABELS = "the file SEED-Bench.json"


def _seed_labels(path: Path) -> dict[str, str]:
    return {
        str(row.value("question_id")): row.one_of("answer", LETTERS)
        for row in object_rows(path, load_object(path), "questions")
    }


def _read_seed(path: Path, answers: Path | None) -> Iterator[Item]:
    labels = _seed_labels(answers) if answers else {}
    for row in read_rows(path):
        text = row.text("text")
        yield Item(
            item_id=row.own_id,
            category=row.fields.get("category") or "all",
            image=row.text("image"),
            question=text,
            answer=label_of(row, labels.get(row.own_id), LETTERS),
            choices=tuple(lettered_options(text).values()) or LETTERS,
            plain=True,
        )


SEED = Benchmark(
    name="seed",
    summary="SEED-Bench: lettered options",
    obtain=(
        "Take `bunny-seed-bench.jsonl` of the evaluation data of SpatialBot or Bunny and give "
        f"{SEED_LABELS} (huggingface.co/datasets/AILab-CVC/SEED-Bench) with --answers. {INLINE}"
    ),
    conventions=_CONVENTIONS,
    read=_read_seed,
    measure=_measure,
    readable=_is_readable,
    labels=SEED_LABELS,
)
