"""Which faults explain that a simulated run fails or drops a prompt. What none of them explains is a broken promise."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from sif_ray.judge.outcome import JudgeUnavailable
from sif_ray.learner.actor import LearnerDied
from sif_ray.loop.grpo import NO_SPREAD, LoopError
from sif_ray.loop.pool import PoolError

# Budgets as they are promised, not as the loop has them.
DEATHS = 3  # of a worker or learner that are made good; one more may end the run
FAILURES = 3  # of a ticket, which may be dropped with the last of them

_SILENCE = {"lost", "late", "asleep"}
_DEATHS = {"engine_dies", "scorer_dies", "start_fails"}
_NO_REWARDS = {"judge_fails", "judge_down", "late"}

# What can have ended a run so, and how often it must have happened for that.
_OF_FAILURES: list[tuple[type[Exception], str, set[str], int]] = [
    (LearnerDied, "", {"learner_dies"}, DEATHS + 1),
    (LoopError, "is stuck", _SILENCE, 1),
    (LoopError, "the receipt says", {"wrong_bytes"}, 1),
    (LoopError, "no group could be trained", {"refused"} | _NO_REWARDS | _SILENCE, 1),
    (PoolError, "was lost", _DEATHS | _SILENCE | {"disk_fails"}, DEATHS + 1),
    (JudgeUnavailable, "answered nothing", _NO_REWARDS | {"asleep"}, 1),
    (OSError, "No space left", {"disk_fails"}, 1),
]
_OF_DROPS = [
    ("request refused", {"refused"}, 1),
    ("HTTP 400", {"judge_fails"}, 1),
    ("lease expired", _SILENCE | _NO_REWARDS, FAILURES),
    ("engine lost", set(), 1),
    ("judge unavailable", set(), 1),
    ("", _NO_REWARDS, FAILURES),  # any other reason is the judge's
]


def explains_failure(happened: Mapping[str, int], error: Exception) -> bool:
    """Whether what has happened in a life, {field of `Rates`: how often}, can have ended it so."""
    return any(
        isinstance(error, kind) and text in str(error) and _happened(happened, causes) >= often
        for kind, text, causes, often in _OF_FAILURES
    )


def explains_drop(happened: Mapping[str, int], reason: str, dynamic_sampling: bool) -> bool:
    """Whether it can have cost a prompt, for this reason."""
    if reason == NO_SPREAD:
        return dynamic_sampling
    causes, often = next((causes, often) for text, causes, often in _OF_DROPS if text in reason)
    return _happened(happened, causes) >= often


def _happened(happened: Mapping[str, int], causes: Collection[str]) -> int:
    return sum(happened.get(cause, 0) for cause in causes)
