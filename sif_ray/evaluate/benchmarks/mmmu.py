"""MMMU (arXiv 2311.16502): college questions, lettered or open, parsed by the rules of its evaluation."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from string import ascii_uppercase

from sif_ray.evaluate.benchmarks.files import Row, read_rows
from sif_ray.evaluate.benchmarks.item import Benchmark, Item, Reply
from sif_ray.evaluate.measure import Measure, Point, point, pooled
from sif_ray.evaluate.replies import option_letter, plain_answer

SUBJECTS = (
    "Accounting", "Agriculture", "Architecture_and_Engineering", "Art", "Art_Theory", "Basic_Medical_Science",
    "Biology", "Chemistry", "Clinical_Medicine", "Computer_Science", "Design", "Diagnostics_and_Laboratory_Medicine",
    "Economics", "Electronics", "Energy_and_Power", "Finance", "Geography", "History", "Literature", "Manage",
    "Marketing", "Materials", "Math", "Mechanical_Engineering", "Music", "Pharmacy", "Physics", "Psychology",
    "Public_Health", "Sociology",
)  # fmt: skip

_ID = re.compile(r"[a-z]+_(\w+)_[0-9]+")
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)
_WITHHELD = "?"  # the answer of every question of the split test
_MULTIPLE = "multiple-choice"


def _read(path: Path, answers: Path | None) -> Iterator[Item]:
    for row in read_rows(path):
        name = row.text("id")
        subject = _ID.fullmatch(name)
        lettered = row.one_of("question_type", (_MULTIPLE, "open")) == _MULTIPLE
        choices = _listed(row, "options") if lettered else ()
        options = "".join(f"({letter}) {choice}\n" for letter, choice in zip(ascii_uppercase, choices, strict=False))
        ask = (
            f"{options}\nAnswer with the option's letter from the given choices directly."
            if lettered
            else "\nAnswer the question using a single word or phrase."
        )
        letters = tuple(ascii_uppercase[: len(choices)])
        labelled = row.has("answer") and row.text("answer") != _WITHHELD
        yield Item(
            item_id=name,
            category=subject[1] if subject else "all",
            image="",
            question=f"{row.text('question')}\n{ask}",
            answer=row.one_of("answer", letters) if lettered and labelled else "",
            answers=_listed(row, "answer") if labelled and not lettered else (),
            choices=choices,
            plain=True,
            num_images=sum(row.has(f"image_{number}") for number in range(1, 8)) or 1,
            picture=partial(row.picture, "image_1"),
        )


def _listed(row: Row, field: str) -> tuple[str, ...]:
    """A list, which the files hold as Python text; an answer that is no list is the only one."""
    text = row.text(field)
    if not text.startswith("["):
        return (text,)
    try:
        found = ast.literal_eval(text)
    except (SyntaxError, ValueError) as error:
        raise row.error(field, f"is {text!r:.80}; expected a list ({error})") from error
    return tuple(str(value) for value in found)


def published_letter(text: str, choices: Sequence[str]) -> str | None:
    """The official parser: the last of "(B)", else of " B ", else of an option's words in more than five; None = none.

    Where it finds none, the released script guesses.
    """
    letters = ascii_uppercase[: len(choices)]
    for mark in ",.!?;:'":
        text = text.strip(mark)
    padded = f" {text} "
    found = {letter: padded.rfind(f"({letter})") for letter in letters}
    if max(found.values()) < 0:
        found = {letter: padded.rfind(f" {letter} ") for letter in letters}
    if max(found.values()) < 0 and len(text.split()) > 5:
        found = {letter: padded.lower().rfind(choice.lower()) for letter, choice in zip(letters, choices, strict=True)}
    return max(found, key=found.__getitem__) if max(found.values()) >= 0 else None


def open_is_right(text: str, truths: Sequence[str]) -> bool:
    """The official rule: a number of the key phrases equals a truth, or a truth is a part of one of them."""
    phrases = _key_phrases(text)
    numbers = [number for phrase in phrases for pattern in _NUMBERS for number in re.findall(pattern, phrase)]
    given = [value for phrase in (*phrases, *numbers) for value in _normal(phrase)]
    wanted = [value for truth in truths for value in _normal(truth)]
    words = [value for value in wanted if isinstance(value, str)]
    return any(value in wanted if isinstance(value, float) else any(word in value for word in words) for value in given)


def _key_phrases(text: str) -> list[str]:
    """What follows the words that announce an answer, the shortest of each line; else the whole text."""
    text = text.strip().strip(".").lower()
    lines = text.split("\n")
    phrases = []
    for index, line in enumerate(lines):
        keys = (*_KEYS, "=") if index == len(lines) - 1 else _KEYS
        tails = [tail for key in keys if key in line and (tail := line.split(key)[-1].strip())]
        if tails and (shortest := min(tails, key=len)) not in tuple(":,.!?;'"):
            phrases.append(shortest)
    return phrases or [text]


def _normal(text: str) -> list[str | float]:
    """A number rounded to 2 decimals, else lower case; a single letter only between blanks."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def _measure(replies: Sequence[Reply]) -> list[Measure]:
    return [pooled("accuracy", ((reply.item.category, _point(reply)) for reply in replies))]


def _point(reply: Reply) -> Point:
    item, answer = reply.item, plain_answer(reply.text)
    if not item.choices:
        strict = bool(answer) and open_is_right(answer, item.answers)
        return point(item.scene_id, strict, open_is_right(reply.text, item.answers))
    letter = published_letter(reply.text, item.choices)
    published = 1 / len(item.choices) if letter is None else float(letter == item.answer)
    return point(item.scene_id, _chosen(reply) == item.answer, published)


def _chosen(reply: Reply) -> str | None:
    return option_letter(plain_answer(reply.text), reply.item.choices)


def _is_readable(reply: Reply) -> bool:
    return _chosen(reply) is not None if reply.item.choices else bool(plain_answer(reply.text))


MMMU = Benchmark(
    name="mmmu",
    summary="MMMU: lettered and open questions of 30 subjects",
    obtain=(
        "Take the split validation of huggingface.co/datasets/MMMU/MMMU (900 questions with their images): the folder "
        "with `<subject>/validation-00000-of-00001.parquet`, 30 of them, or one such file. The split test, which the "
        "released script runs, has no public answers: hand predictions on it to the server of MMMU."
    ),
    conventions=(
        "strict: the answer must choose the letter; published: the official parser, and where it finds none, what its "
        "random guess is worth on average"
    ),
    read=_read,
    measure=_measure,
    readable=_is_readable,
    files=tuple(f"{subject}/validation-00000-of-00001.parquet" for subject in SUBJECTS),
)
