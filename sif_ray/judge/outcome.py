"""What a judge can say about an answer. A failure is never a score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Scored:
    """The judge has compared the answer with the reference."""

    score: float  # in [0, 1]; 1 = as good as the reference


@dataclass(frozen=True)
class Abstained:
    """The judge works but has no verdict on this item, now or later; asking again is of no use."""

    reason: str  # one of few, so that reasons can be counted


@dataclass(frozen=True)
class Failed:
    """The judge works and gave no score this time; the item may be tried again."""

    reason: str  # one of few, so that reasons can be counted


@dataclass(frozen=True)
class Unavailable:
    """The judge answers nobody, which is no fault of this item."""

    reason: str  # one of few, so that reasons can be counted
    advice: str  # for people: what was tried and what to do


Outcome = Scored | Abstained | Failed | Unavailable


class JudgeUnavailable(RuntimeError):
    """What somebody needed a verdict for cannot go on; the message says where the judge is and what was tried."""


class Judge(Protocol):
    """Scores one answer. Its failures are outcomes; it raises only for errors in the program."""

    async def judge(self, question: str, answer: str, prediction: str, image: bytes) -> Outcome:
        """Compare `prediction` with the reference `answer` to `question` about `image` (encoded RGB)."""
        ...

    def metrics(self) -> dict[str, float]:
        """Totals since the judge was made, as "judge/..."; empty when there is nothing to measure."""
        ...

    async def close(self) -> None:
        """Give up what is being asked, and close what is open."""
        ...
