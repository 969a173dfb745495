"""Which faults explain that a simulated run fails or drops a prompt. What none of them explains is a broken promise."""

from __future__ import annotations

from collections.abc import Collection

from sif_ray.learner.actor import LearnerDied
from sif_ray.loop.grpo import NO_SPREAD, LoopError
from sif_ray.loop.pool import PoolError

_SILENCE = {"lost", "late", "asleep"}
_DEATHS = {"engine_dies", "scorer_dies", "start_fails"}
_NO_REWARDS = {"judge_fails", "judge_down", "late"}

_OF_FAILURES: list[tuple[type[Exception], str, set[str]]] = [
    (LearnerDied, "", {"learner_dies"}),
    (LoopError, "is stuck", _SILENCE),
    (LoopError, "the receipt says", {"wrong_bytes"}),
    (LoopError, "no group could be trained", {"refused"} | _NO_REWARDS | _SILENCE),
    (PoolError, "was lost", _DEATHS | _SILENCE),
    (OSError, "No space left", {"disk_fails"}),
]
_OF_DROPS = [("request refused", {"refused"}), ("lease expired", _SILENCE | _NO_REWARDS), ("engine lost", set())]


def explains_failure(happened: Collection[str], error: Exception) -> bool:
    """Whether one of the kinds of faults that have happened in a life (fields of `Rates`) can have ended it so."""
    return any(
        isinstance(error, kind) and text in str(error) and not causes.isdisjoint(happened)
        for kind, text, causes in _OF_FAILURES
    )


def explains_drop(happened: Collection[str], reason: str, dynamic_sampling: bool) -> bool:
    """Whether one of them can have cost a prompt, for this reason; any other reason than those above is the judge's."""
    if reason == NO_SPREAD:
        return dynamic_sampling
    causes = next((causes for text, causes in _OF_DROPS if text in reason), _NO_REWARDS)
    return not causes.isdisjoint(happened)
