"""Short answers as VQA's evaluation compares them (visualqa.org/evaluation; arXiv 1505.00468)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import product

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_LAST_PERIOD = re.compile(r"\.(?![0-9])")
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_DIGITS)}}
_ARTICLES = {"a", "an", "the"}
_SHORT_FORMS = (
    "ain't", "aren't", "can't", "could've", "couldn't", "couldn't've", "didn't", "doesn't", "don't", "hadn't",
    "hadn't've", "hasn't", "haven't", "he'd", "he'd've", "he's", "how'd", "how'll", "how's", "isn't", "it'd",
    "it'd've", "it'll", "ma'am", "might've", "mightn't", "mightn't've", "must've", "mustn't", "needn't", "not've",
    "o'clock", "oughtn't", "shan't", "she'd've", "should've", "shouldn't", "shouldn't've", "someone'd",
    "someone'd've", "someone'll", "someone's", "something'd", "something'd've", "something'll", "that's", "there'd",
    "there'd've", "there're", "there's", "they'd", "they'd've", "they'll", "they're", "they've", "'twas", "wasn't",
    "we'd've", "we've", "weren't", "what'll", "what're", "what's", "what've", "when's", "where'd", "where's",
    "where've", "who'd", "who'd've", "who'll", "who's", "who've", "why'll", "why're", "why's", "won't", "would've",
    "wouldn't", "wouldn't've", "y'all", "y'all'll", "y'all'd've", "you'd", "you'd've", "you'll", "you're", "you've",
)  # fmt: skip


def _spellings(short_form: str) -> Iterator[str]:
    """The word without one or more of its apostrophes."""
    parts = short_form.split("'")
    for marks in product("' ", repeat=len(parts) - 1):
        yield "".join(part + mark.strip() for part, mark in zip(parts, (*marks, ""), strict=True))


_APOSTROPHES = {spelling: short_form for short_form in _SHORT_FORMS for spelling in _spellings(short_form)}


def normal(answer: str) -> str:
    """An answer as VQA's evaluation compares it: lower case, digits, no articles, no punctuation, apostrophes set."""
    text = (
        answer.lower()
        .replace(",", "")
        .replace("?", "")
        .replace("'s", " 's")
        .replace("\n", " ")
        .replace("\t", " ")
        .strip()
    )
    plain = text
    for mark in _PUNCTUATION:
        plain = plain.replace(mark, "" if f"{mark} " in text or f" {mark}" in text else " ")
    words = (_NUMBERS.get(word, word) for word in _LAST_PERIOD.sub("", plain).split())
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """Mean over the people of min(1, how many of the others said the same / 3)."""
    given, said = normal(answer), [normal(one) for one in people]
    same = said.count(given)
    return sum(min(1.0, (same - (one == given)) / 3) for one in said) / len(said)
