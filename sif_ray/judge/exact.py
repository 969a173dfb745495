"""A judge that compares text: numbers, yes and no, options, and short answers up to case, articles and synonyms.

It stands where the paper has an LLM judge, is deterministic and needs no network. Scores are 0 or 1.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

from sif_ray.judge.outcome import Abstained, Outcome, Scored

SYNONYMS: tuple[tuple[str, ...], ...] = (
    ("gray", "grey"),
    ("bicycle", "bike"),
    ("motorcycle", "motorbike"),
    ("couch", "sofa"),
    ("television", "tv"),
    ("cell phone", "cellphone", "mobile phone", "smartphone"),
    ("airplane", "aeroplane", "plane"),
)
"""Default groups of phrases that count as the same answer."""

_NUMBER_WORDS = {
    "zero": 0,
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "eleven": 11,
    "twelve": 12,
    "thirteen": 13,
    "fourteen": 14,
    "fifteen": 15,
    "sixteen": 16,
    "seventeen": 17,
    "eighteen": 18,
    "nineteen": 19,
    "twenty": 20,
    "thirty": 30,
    "forty": 40,
    "fifty": 50,
    "sixty": 60,
    "seventy": 70,
    "eighty": 80,
    "ninety": 90,
}
_ARTICLES = {"a", "an", "the"}

_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_TOKEN = re.compile(r"(?<!\w)-?[0-9]*\.?[0-9]+|\w+")
_NUMBER = re.compile(r"-?[0-9]*\.?[0-9]+")
_OPTION_MARK = re.compile(r"(?<![A-Za-z0-9])\(?([A-H])[).:]")
_NAMED_OPTION = re.compile(r"\s*(?:(?:option|choice|answer)\s+\(?([a-z])\b|\(([a-z])\)|([a-z])[).:]|([a-z])\s*$)", re.I)


class ExactMatchJudge:
    """Compares a prediction with the reference as text.

    Example: with answer "3", the predictions "three", "3." and "There are 3 cups" score 1; "3 or 4" scores 0.
    """

    def __init__(self, synonyms: Iterable[Sequence[str]] = SYNONYMS) -> None:
        """`synonyms`: groups of phrases that mean the same; the first of a group stands for all."""
        self._canonical = {
            " ".join(_tokens(phrase)): " ".join(_tokens(group[0])) for group in synonyms for phrase in group[1:]
        }
        longest_first = sorted(self._canonical, key=len, reverse=True)
        self._synonym = re.compile(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b") if longest_first else None

    async def judge(self, question: str, answer: str, prediction: str, image: bytes) -> Outcome:
        """`Scored` 0 or 1; `Abstained` when there is no reference answer. The image is not looked at."""
        if not answer.strip():
            return Abstained("the sample has no reference answer")
        return Scored(float(self.same(question, answer, prediction)))

    def metrics(self) -> dict[str, float]:
        """None: comparing text costs nothing."""
        return {}

    async def close(self) -> None:
        """Nothing is open."""

    def same(self, question: str, answer: str, prediction: str) -> bool:
        """True when `prediction` gives the same answer to `question` as `answer`."""
        options = {letter: self._normal(text) for letter, text in lettered_options(question).items()}
        wanted = self._option(answer, options)
        if wanted is not None:
            return self._option(prediction, options) == wanted
        reference, given = self._normal(answer), self._normal(prediction)
        if reference in ("yes", "no"):
            return given.split(" ", 1)[0] == reference
        if _NUMBER.fullmatch(reference):
            return {token for token in given.split(" ") if _NUMBER.fullmatch(token)} == {reference}
        return given == reference

    def _normal(self, text: str) -> str:
        """Lower case, number words as digits, without articles and punctuation, synonyms replaced."""
        tokens = _tokens(text)
        words = " ".join([token for token in tokens if token not in _ARTICLES] or tokens)
        return self._synonym.sub(lambda found: self._canonical[found[0]], words) if self._synonym else words

    def _option(self, text: str, options: dict[str, str]) -> str | None:
        """The letter of the option that `text` names or quotes; None when it does neither."""
        named = _NAMED_OPTION.match(text)
        if named:
            letter = next(group for group in named.groups() if group).lower()
            if not options or letter in options:
                return letter
        normal = self._normal(text)
        return next((letter for letter, option in options.items() if option == normal), None)


def _tokens(text: str) -> list[str]:
    plain = unicodedata.normalize("NFKC", text).casefold().replace("'", "").replace("’", "")
    tokens: list[str] = []
    after_tens = False
    for token in _TOKEN.findall(_THOUSANDS.sub("", plain)):
        value = _NUMBER_WORDS.get(token)
        if after_tens and value is not None and 0 < value < 10:
            tokens[-1] = str(int(tokens[-1]) + value)
        elif value is not None:
            tokens.append(str(value))
        else:
            tokens.append(_plain_number(token) if _NUMBER.fullmatch(token) else token)
        after_tens = value is not None and value >= 20
    return tokens


def _plain_number(token: str) -> str:
    """ "007" and "7.0" as "7", ".5" as "0.5", "-0" as "0"; text, so that length is no matter."""
    sign, digits = ("-", token[1:]) if token.startswith("-") else ("", token)
    whole, _, fraction = digits.partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    return number if number == "0" else sign + number


def lettered_options(question: str) -> dict[str, str]:
    """{"a": text, ...} of the options a question lists as "(A) ..." or "A. ...", in alphabetical order from A."""
    marks: list[re.Match[str]] = []
    for mark in _OPTION_MARK.finditer(question):
        if mark[1] == "ABCDEFGH"[len(marks) : len(marks) + 1]:
            marks.append(mark)
    if len(marks) < 2:
        return {}
    ends = [mark.start() for mark in marks[1:]] + [len(question)]
    texts = [question[mark.end() : end].split("\n")[0] for mark, end in zip(marks, ends, strict=True)]
    return {mark[1].lower(): text for mark, text in zip(marks, texts, strict=True)}
