"""An output that is still being written, divided into the answer and everything else."""

from __future__ import annotations

from dataclasses import dataclass

_OPEN, _CLOSE = "<answer>", "</answer>"


@dataclass(frozen=True)
class Part:
    """What one piece of an output adds to either side."""

    thinking: str = ""
    answer: str = ""


class AnswerSplit:
    """Takes an output piece by piece. `answer` is what the first answer block holds, without space around it, closed or
    cut off; `thinking` is all the rest but the block's tags. A piece that may be the start of a tag waits for the next.

    Example: `split = AnswerSplit(); split.feed("<think>...</think><answer>red")` gives both sides, then `split.end()`.
    """

    def __init__(self) -> None:
        self._waiting = ""
        self._tag = _OPEN  # what comes next; "" after the block
        self._begun = False  # something of the answer has been seen

    def feed(self, text: str) -> Part:
        self._waiting += text
        thinking, answer = "", ""
        while self._tag:
            before, found, after = self._waiting.partition(self._tag)
            if not found:
                break
            if self._tag == _OPEN:
                thinking, self._tag = thinking + before, _CLOSE
            else:
                answer, self._tag = answer + self._stripped(before.rstrip()), ""
            self._waiting = after
        size = self._certain()
        certain, self._waiting = self._waiting[:size], self._waiting[size:]
        if self._tag == _CLOSE:
            return Part(thinking, answer + self._stripped(certain))
        return Part(thinking + certain, answer)

    def end(self) -> Part:
        """What was still waiting; nothing comes after it."""
        rest, self._waiting = self._waiting, ""
        if self._tag == _CLOSE:
            return Part(answer=self._stripped(rest.rstrip()))
        return Part(thinking=rest)

    def _certain(self) -> int:
        """How much of what waits belongs to its side whatever follows."""
        if not self._tag:
            return len(self._waiting)
        longest = min(len(self._tag) - 1, len(self._waiting))
        size = next((n for n in range(longest, 0, -1) if self._waiting.endswith(self._tag[:n])), 0)
        certain = self._waiting[: len(self._waiting) - size]
        return len(certain.rstrip()) if self._tag == _CLOSE else len(certain)

    def _stripped(self, text: str) -> str:
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        return text


def split_answer(text: str) -> Part:
    """Both sides of a whole output."""
    split = AnswerSplit()
    first, last = split.feed(text), split.end()
    return Part(first.thinking + last.thinking, first.answer + last.answer)
