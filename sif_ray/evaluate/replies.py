"""What an output text says: the answer, the boxes it ended on, the option it chose."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

from sif_ray.method.boxes import Box
from sif_ray.method.trace import find_answer, find_areas

_EDGES = " \t\r\n*_`\"'“”‘’"  # white space, quotes and Markdown's emphasis around an answer
_NO_SECOND = r"(?!\)?\s*(?:or|and|,|/)\s*\(?[A-Z](?!\w))"  # "answer is B or C" chooses none
_ENDS = r"(?=\)?[*_]*\s*(?:[.,;:!]|because|since|$))"  # "answer is A red car" names no option
_LETTER = rf"((?:A{_ENDS}|[B-Z](?!\w)){_NO_SECOND})"
_BARE = re.compile(r"\(?([A-Za-z])[).:,*_]*")
_STATED = re.compile(r"(?i:answer(?:\s+is)?)\s*[:=]?\s*[*_]*\(?" + _LETTER)
_MENTIONED = re.compile(r"(?<!\w)\(?([A-Z])\)|(?i:option|choice)(?:\s+is)?\s*[:=]?\s*[*_]*" + _LETTER)
_LEADING = re.compile(r"([A-Z])[.:]\s")
_FENCED = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL)


def plain_answer(text: str) -> str:
    """The answer block where there is one, else the whole text; stripped."""
    return find_answer(text) or text.strip()


def last_boxes(text: str) -> list[Box]:
    """The boxes of the last area, as they stand; none where it cannot be read or there is no area."""
    areas = find_areas(text)
    return [box.bbox_2d for box in areas[-1]] if areas else []


def option_letter(answer: str | None, choices: Sequence[str]) -> str | None:
    """The capital letter of the option that an answer chooses; None where it chooses none or several.

    In this order: a letter alone; "answer is B"; letters in brackets and "option B"; "B. ..." at the start; the words
    of one option. A capital letter elsewhere ("A red car") is a word.

    Args:
        choices: the options' texts; their number says which letters there are.
    """
    if answer is None:
        return None
    letters = ascii_uppercase[: len(choices)]
    text = answer.strip(_EDGES)
    if bare := _BARE.fullmatch(text):
        return _only({bare[1].upper()}, letters)
    for pattern in (_STATED, _MENTIONED):
        if named := {"".join(found.groups("")) for found in pattern.finditer(text)}:
            return _only(named, letters)
    if leading := _LEADING.match(text):
        return _only({leading[1]}, letters)
    words = _plain(text)
    return _only({letter for letter, choice in zip(letters, choices, strict=True) if _plain(choice) == words}, letters)


def _only(named: set[str], letters: str) -> str | None:
    [letter] = named if len(named) == 1 else [""]
    return letter if letter and letter in letters else None


def _plain(text: str) -> str:
    return text.strip(_EDGES + ".").casefold()


def json_list(answer: str) -> list[Any] | None:
    """The JSON list that an answer is, in a ```json fence or not; [] for "None". None where there is no list."""
    fenced = _FENCED.search(answer)
    text = (fenced[1] if fenced else answer).strip()
    if text.rstrip(".").casefold() == "none":
        return []
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) else None
