"""The SIF trace: grammar, strict parser with every reason of refusal, renderer and lenient readers.

A trace is what the policy writes: areas of focus and what is seen there, in turns, then the answer::

    <think><area>[{"bbox_2d":[0.000,0.000,1.000,1.000],"depth":0.583}]</area>
    <text>A car stands behind a bottle.</text><area>[{"bbox_2d":[0.100,0.200,0.350,0.800],"depth":0.787}]</area>
    <text>The bottle has the smaller depth.</text></think>
    <answer>The bottle</answer>

All readers take time linear in the text, whatever it holds.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from typing import NoReturn

from sif_ray.method.boxes import Box, is_number
from sif_ray.method.profile import CORRECTED, Profile, resolve

DECIMALS = 3
"""Most decimals a number of a trace may have."""

MAX_AREA_BOXES = 256
"""Most boxes in one area: twice what a completion of 2048 tokens holds. It keeps scoring cheap for any text."""

_MAX_NUMBER_CHARS = 64  # a longer literal is no coordinate, and converting very long ones takes quadratic time
_TAG = re.compile(r"</?(?:think|answer|area|text)>")
_OUTER_TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
_STEP_TAGS = ["<area>", "</area>", "<text>", "</text>"]


class Reason(StrEnum):
    """Why a text is not a trace. The values are stable: they are counted, stored and compared between runs."""

    NOT_TEXT = "not_text"
    NO_THINK = "no_think"
    NO_ANSWER = "no_answer"
    ANSWER_EMPTY = "answer_empty"
    THINK_START = "think_start"
    THINK_END = "think_end"
    TAG_ORDER = "tag_order"
    STRAY_TAG = "stray_tag"
    STRAY_TEXT = "stray_text"
    TEXT_EMPTY = "text_empty"
    AREA_NOT_JSON = "area_not_json"
    AREA_NOT_LIST = "area_not_list"
    AREA_EMPTY = "area_empty"
    AREA_TOO_LONG = "area_too_long"
    ITEM_NOT_OBJECT = "item_not_object"
    KEY_REPEATED = "key_repeated"
    BBOX_NOT_FOUR_NUMBERS = "bbox_not_four_numbers"
    BBOX_OUT_OF_RANGE = "bbox_out_of_range"
    BBOX_INVERTED = "bbox_inverted"
    DEPTH_NOT_NUMBER = "depth_not_number"
    DEPTH_OUT_OF_RANGE = "depth_out_of_range"
    TOO_MANY_DECIMALS = "too_many_decimals"

    @property
    def explanation(self) -> str:
        return EXPLANATIONS[self]


_PLACES = {reason: place for place, reason in enumerate(Reason)}

EXPLANATIONS: dict[Reason, str] = {
    Reason.NOT_TEXT: "the value is not a string",
    Reason.NO_THINK: "there is no <think>...</think>",
    Reason.NO_ANSWER: "there is no <answer>...</answer>",
    Reason.ANSWER_EMPTY: "the answer is blank",
    Reason.THINK_START: "the thinking does not begin with <area>",
    Reason.THINK_END: "the thinking does not end with </text>",
    Reason.TAG_ORDER: "the tags in the thinking are not <area></area><text></text>, repeated",
    Reason.STRAY_TAG: "a think, answer, area or text tag is repeated or stands where the grammar has none",
    Reason.STRAY_TEXT: "there are words between the areas and texts of the thinking",
    Reason.TEXT_EMPTY: "a <text> is blank",
    Reason.AREA_NOT_JSON: "the content of an <area> is not JSON",
    Reason.AREA_NOT_LIST: "the content of an <area> is not a JSON list",
    Reason.AREA_EMPTY: "an <area> lists no box",
    Reason.AREA_TOO_LONG: f"an <area> lists more than {MAX_AREA_BOXES} boxes",
    Reason.ITEM_NOT_OBJECT: "an entry of an <area> is not a JSON object",
    Reason.KEY_REPEATED: "a JSON object has the same key twice",
    Reason.BBOX_NOT_FOUR_NUMBERS: "bbox_2d is missing or not a list of 4 finite numbers",
    Reason.BBOX_OUT_OF_RANGE: "a number of bbox_2d is outside [0, 1]",
    Reason.BBOX_INVERTED: "bbox_2d has x2 <= x1 or y2 <= y1",
    Reason.DEPTH_NOT_NUMBER: "depth is missing or not a finite number",
    Reason.DEPTH_OUT_OF_RANGE: "depth is outside [0, 1]",
    Reason.TOO_MANY_DECIMALS: f"a number has more than {DECIMALS} decimals",
}


class TraceError(ValueError):
    """A text that is not a trace. ``reasons`` holds every :class:`Reason` found, in the order of the enum."""

    def __init__(self, reasons: Iterable[Reason]) -> None:
        self.reasons: tuple[Reason, ...] = tuple(sorted(set(reasons), key=_PLACES.__getitem__))
        super().__init__("not a SIF trace: " + "; ".join(f"{r.explanation} ({r})" for r in self.reasons))

    def __reduce__(self) -> tuple[type[TraceError], tuple[tuple[Reason, ...]]]:
        return type(self), (self.reasons,)


@dataclass(frozen=True)
class AreaBox:
    """One box of an area.

    Example:
        ``AreaBox((0.1, 0.2, 0.35, 0.8), 0.787)``
    """

    bbox_2d: Box
    """Image frame. A valid box if it comes from :func:`parse`, any four numbers if from :func:`find_areas`."""
    depth: float | None
    """Mean relative depth of the box, 0 = near; None = none could be read, which only :func:`find_areas` returns."""


@dataclass(frozen=True)
class Step:
    """One look: where (``boxes``) and what is seen there (``text``)."""

    boxes: tuple[AreaBox, ...]
    text: str


@dataclass(frozen=True)
class Trace:
    """A whole reply: at least one step, then the answer."""

    steps: tuple[Step, ...]
    answer: str

    def render(self, decimals: int = DECIMALS) -> str:
        """The text of this trace; every number has exactly ``decimals`` decimals.

        ``parse(trace.render()) == trace`` up to that rounding and white space around texts and answer.

        Raises:
            TraceError: if the text would not be a trace, say because a text holds a tag or a box vanishes when rounded.
            ValueError: for ``decimals`` outside 1..3.
        """
        if decimals not in range(1, DECIMALS + 1):
            raise ValueError(f"decimals is {decimals!r}; a trace has 1 to {DECIMALS}")
        steps = "".join(
            f"<area>{render_area(step.boxes, decimals)}</area>\n<text>{step.text.strip()}</text>" for step in self.steps
        )
        text = f"<think>{steps}</think>\n<answer>{self.answer.strip()}</answer>"
        parse(text, _RENDERABLE)
        return text


_RENDERABLE = replace(CORRECTED, name="renderable", empty_area_allowed=True)


def render_area(boxes: Sequence[AreaBox], decimals: int = DECIMALS) -> str:
    """The JSON list inside ``<area>``: ``[{"bbox_2d":[x1,y1,x2,y2],"depth":d}, ...]``.

    Raises:
        TraceError: if a box has no depth.
    """
    items = []
    for box in boxes:
        if box.depth is None:
            raise TraceError({Reason.DEPTH_NOT_NUMBER})
        numbers = ",".join(f"{value:.{decimals}f}" for value in box.bbox_2d)
        items.append(f'{{"bbox_2d":[{numbers}],"depth":{box.depth:.{decimals}f}}}')
    return f"[{', '.join(items)}]"


def parse(text: object, profile: str | Profile = "corrected") -> Trace:
    """Read a trace (paper: r_format).

    The first ``<think>`` block and the first ``<answer>`` block count; words around them are ignored.

    Raises:
        TraceError: with every reason found, also if ``text`` is no string.
    """
    rules = resolve(profile)
    if not isinstance(text, str):
        raise TraceError({Reason.NOT_TEXT})
    reasons: set[Reason] = set()
    answer = _block(text, "<answer>", "</answer>")
    if answer is None:
        reasons.add(Reason.NO_ANSWER)
    elif not answer.strip():
        reasons.add(Reason.ANSWER_EMPTY)

    think = _block(text, "<think>", "</think>")
    if think is None:
        reasons.add(Reason.NO_THINK)
    else:
        reasons |= _order_reasons(think, rules)
        if answer is not None and not rules.stray_content_allowed and _has_stray_tag(text, think):
            reasons.add(Reason.STRAY_TAG)

    body = text if think is None else think
    areas = [_read_area(content, rules) for content in _blocks(body, "<area>", "</area>")]
    texts = [content.strip() for content in _blocks(body, "<text>", "</text>")]
    for _, area_reasons in areas:
        reasons |= area_reasons
    if not all(texts):
        reasons.add(Reason.TEXT_EMPTY)
    if reasons or answer is None:
        raise TraceError(reasons)
    steps = (Step(boxes, words) for (boxes, _), words in zip(areas, texts, strict=True))
    return Trace(tuple(steps), answer.strip())


def find_answer(text: object) -> str | None:
    """The content of the first ``<answer>`` block, stripped; None if there is none or it is blank."""
    content = _block(text, "<answer>", "</answer>") if isinstance(text, str) else None
    return (content.strip() or None) if content is not None else None


def find_areas(text: object, *, strict: bool = False) -> list[list[AreaBox]]:
    """The boxes of every ``<area>`` block of a text that need not be a trace, one list per block, in order.

    An entry counts if its ``bbox_2d`` is a list of four finite numbers, inside the image or not. Other entries are left
    out, so a block nothing can be read from gives an empty list. A block with more than :data:`MAX_AREA_BOXES` entries
    counts as unreadable.

    Args:
        strict: refuse a text in which anything was left out.

    Raises:
        TraceError: only if ``strict``.
    """
    if not isinstance(text, str):
        if strict:
            raise TraceError({Reason.NOT_TEXT})
        return []
    areas = []
    for content in _blocks(text, "<area>", "</area>"):
        boxes, reasons = _read_area(content, CORRECTED)
        if strict and reasons & _UNREADABLE:
            raise TraceError(reasons & _UNREADABLE)
        areas.append(list(boxes))
    return areas


_UNREADABLE = {
    Reason.AREA_NOT_JSON,
    Reason.AREA_NOT_LIST,
    Reason.AREA_TOO_LONG,
    Reason.ITEM_NOT_OBJECT,
    Reason.BBOX_NOT_FOUR_NUMBERS,
}


# ------------------------------------------------------------------------------------------------- tags


def _block(text: str, opening: str, closing: str) -> str | None:
    return next(_blocks(text, opening, closing), None)


def _blocks(text: str, opening: str, closing: str) -> Iterator[str]:
    """Contents from each ``opening`` to the next ``closing``, as a non-greedy pattern finds them, in linear time."""
    end = 0
    while (start := text.find(opening, end)) >= 0:
        start += len(opening)
        stop = text.find(closing, start)
        if stop < 0:
            return
        yield text[start:stop]
        end = stop + len(closing)


def _order_reasons(think: str, rules: Profile) -> set[Reason]:
    reasons = set()
    body = think.strip()
    if not body.startswith("<area>"):
        reasons.add(Reason.THINK_START)
    if not body.endswith("</text>"):
        reasons.add(Reason.THINK_END)
    tags = [match for match in _TAG.finditer(body) if match.group() not in _OUTER_TAGS]
    if not tags or [tag.group() for tag in tags] != _STEP_TAGS * (len(tags) // 4):
        reasons.add(Reason.TAG_ORDER)
    elif not rules.stray_content_allowed:
        between = (body[tags[k].end() : tags[k + 1].start()] for k in range(1, len(tags) - 1, 2))
        if any(words.strip() for words in between):
            reasons.add(Reason.STRAY_TEXT)
    return reasons


def _has_stray_tag(text: str, think: str) -> bool:
    """Whether any tag stands elsewhere than steps inside one think block, followed by one answer block."""
    start = text.find("<think>") + len("<think>")
    outer = []
    for match in _TAG.finditer(text):
        if start <= match.start() < start + len(think):
            if match.group() in _OUTER_TAGS:
                return True
        else:
            outer.append(match.group())
    return outer != _OUTER_TAGS


# ------------------------------------------------------------------------------------------------- areas


class _Pairs(dict[str, object]):
    """A JSON object that remembers whether a key came twice; the last value counts, as usual for JSON."""

    def __init__(self, pairs: list[tuple[str, object]]) -> None:
        super().__init__(pairs)
        self.repeated = len(self) < len(pairs)


def _number(literal: str) -> float:
    return float(literal) if len(literal) <= _MAX_NUMBER_CHARS else math.nan


def _refuse_constant(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is not JSON")


_PLAIN_NUMBER = r"[01]\.[0-9]{1,3}"
_PLAIN_ITEM = rf'\{{"bbox_2d": ?\[{_PLAIN_NUMBER}(?:, ?{_PLAIN_NUMBER}){{3}}\], ?"depth": ?{_PLAIN_NUMBER}\}}'
_PLAIN_AREA = re.compile(rf"\[{_PLAIN_ITEM}(?:, ?{_PLAIN_ITEM})*\]")
_PLAIN_NUMBERS = re.compile(_PLAIN_NUMBER)

_DECODER = json.JSONDecoder(
    object_pairs_hook=_Pairs, parse_float=_number, parse_int=_number, parse_constant=_refuse_constant
)


@lru_cache(maxsize=64)  # every reward term of a text reads its areas
def _read_area(content: str, rules: Profile) -> tuple[tuple[AreaBox, ...], frozenset[Reason]]:
    """The readable boxes of one area and everything wrong with it."""
    if _PLAIN_AREA.fullmatch(content):  # as nearly all are: needs no JSON decoder
        return _read_plain_area(content)
    try:
        value = _DECODER.decode(content.strip())
    except (ValueError, RecursionError):  # RecursionError: lists nested thousands deep
        return (), frozenset({Reason.AREA_NOT_JSON})
    if not isinstance(value, list):
        return (), frozenset({Reason.AREA_NOT_LIST})
    if len(value) > MAX_AREA_BOXES:
        return (), frozenset({Reason.AREA_TOO_LONG})
    boxes: list[AreaBox] = []
    reasons: set[Reason] = set()
    if not value and not rules.empty_area_allowed:
        reasons.add(Reason.AREA_EMPTY)
    for item in value:
        if not isinstance(item, _Pairs):
            reasons.add(Reason.ITEM_NOT_OBJECT)
            continue
        if item.repeated and not rules.stray_content_allowed:
            reasons.add(Reason.KEY_REPEATED)
        box, depth = item.get("bbox_2d"), item.get("depth")
        depth = depth if isinstance(depth, float) and is_number(depth) else None
        reasons |= _depth_reasons(depth) if depth is not None else {Reason.DEPTH_NOT_NUMBER}
        if isinstance(box, list) and len(box) == 4 and all(is_number(number) for number in box):
            x1, y1, x2, y2 = box
            reasons |= _bbox_reasons((x1, y1, x2, y2))
            boxes.append(AreaBox((x1, y1, x2, y2), depth))
        else:
            reasons.add(Reason.BBOX_NOT_FOUR_NUMBERS)
    return tuple(boxes), frozenset(reasons)


def _read_plain_area(content: str) -> tuple[tuple[AreaBox, ...], frozenset[Reason]]:
    numbers = map(float, _PLAIN_NUMBERS.findall(content))
    boxes = tuple(
        AreaBox((x1, y1, x2, y2), depth)
        for x1, y1, x2, y2, depth in zip(numbers, numbers, numbers, numbers, numbers, strict=True)
    )
    if len(boxes) > MAX_AREA_BOXES:
        return (), frozenset({Reason.AREA_TOO_LONG})
    reasons = {reason for box in boxes for reason in _range_reasons(box.bbox_2d)}
    if any(box.depth is None or box.depth > 1 for box in boxes):
        reasons.add(Reason.DEPTH_OUT_OF_RANGE)
    return boxes, frozenset(reasons)


def _range_reasons(box: Box) -> set[Reason]:
    x1, y1, x2, y2 = box
    reasons = set()
    if not (0 <= x1 <= 1 and 0 <= y1 <= 1 and 0 <= x2 <= 1 and 0 <= y2 <= 1):
        reasons.add(Reason.BBOX_OUT_OF_RANGE)
    if x2 <= x1 or y2 <= y1:
        reasons.add(Reason.BBOX_INVERTED)
    return reasons


def _bbox_reasons(box: Box) -> set[Reason]:
    reasons = _range_reasons(box)
    if any(round(number, DECIMALS) != number for number in box):
        reasons.add(Reason.TOO_MANY_DECIMALS)
    return reasons


def _depth_reasons(depth: float) -> set[Reason]:
    reasons = set()
    if not 0 <= depth <= 1:
        reasons.add(Reason.DEPTH_OUT_OF_RANGE)
    if round(depth, DECIMALS) != depth:
        reasons.add(Reason.TOO_MANY_DECIMALS)
    return reasons
