"""What can already be shown of an output that is still being written."""

from __future__ import annotations

import re
from dataclasses import replace

from sif_ray.method.trace import Step, find_areas
from sif_ray.serve.answer_split import AnswerSplit

_OUTSIDE, _INSIDE, _BEHIND = re.compile("<think>"), re.compile("</?(?:area|text)>|</think>"), re.compile("(?!)")
_TAG_BEGUN = re.compile(r"</?[a-z]*\Z")
_BEFORE = {"</area>": "<area>", "<text>": "</area>", "</text>": "<text>"}


class GrowingTrace:
    """Takes an output piece by piece. Of a text that `method.trace.parse` accepts, `steps` and `answer` end as what it
    returns. Steps are only added, boxes of a step never change, and texts and answer are only continued.

    `steps` are those of the thinking: one for every closed area, with the text behind it, closed or not. `answer` is
    that of `AnswerSplit`.

    Example: `trace = GrowingTrace(); trace.feed("<think><area>[...]</area><text>A ball"); trace.steps[0].text`.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.answer = ""
        self._split = AnswerSplit()
        self._waiting = ""
        self._sought = _OUTSIDE
        self._tag = ""  # the last one, if it stood where the grammar has it

    def feed(self, piece: str) -> None:
        self.answer += self._split.feed(piece).answer
        if self._sought is _BEHIND:
            return
        self._waiting += piece
        while match := self._sought.search(self._waiting):
            before, self._waiting = self._waiting[: match.start()], self._waiting[match.end() :]
            self._take(before, match.group())
        if self._tag == "<text>":
            self._say(_TAG_BEGUN.sub("", self._waiting))

    def _take(self, before: str, tag: str) -> None:
        if self._tag == "<text>":
            self._say(before)
        if self._tag == "<area>" and tag == "</area>":
            [boxes] = find_areas(f"<area>{before}</area>")
            self.steps.append(Step(tuple(boxes), ""))
        self._tag = tag if tag == "<area>" or _BEFORE.get(tag) == self._tag else ""
        self._sought = _BEHIND if tag == "</think>" else _INSIDE

    def _say(self, text: str) -> None:
        self.steps[-1] = replace(self.steps[-1], text=text.strip())
