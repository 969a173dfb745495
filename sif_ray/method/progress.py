"""The progress record: how well a sample was answered one epoch ago (paper: r_ans, "answer score of last epoch")."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sif_ray.method.boxes import is_number
from sif_ray.method.profile import Profile, resolve
from sif_ray.method.rewards import answer_reward


class ProgressRecord:
    """Mean answer score per sample and epoch.

    Corrected: keeps the mean of the judge's raw scores, and a sample's earlier epoch is all that is ever read, so the
    order in which groups finish within an epoch changes nothing. Published: keeps the mean of the already augmented
    rewards, overwritten at once and not at all when it is exactly 0.

    A sample that was not scored in the last epoch keeps its newest earlier score.

    Example:
        >>> record = ProgressRecord("corrected")
        >>> record.update("toy-17", [0.0, 0.5, 1.0, 0.5])
        >>> record.previous("toy-17") is None  # epoch 0 has no earlier one
        True
        >>> record.advance_epoch()
        >>> record.previous("toy-17")
        0.5
    """

    def __init__(self, profile: str | Profile = "corrected") -> None:
        self._profile = resolve(profile)
        self._epoch = 0
        self._means: dict[str, dict[int, float]] = {}  # sample id -> epoch -> mean; the two newest epochs

    @property
    def epoch(self) -> int:
        """The epoch being written, from 0."""
        return self._epoch

    def previous(self, sample_id: str, epoch: int | None = None) -> float | None:
        """The recorded mean that scores of ``sample_id`` are compared with; None = none yet.

        Args:
            epoch: of the group being scored, if several are in flight; None = the current one.
        """
        means = self._means.get(sample_id, {})
        if self._profile.progress_baseline == "augmented":
            return means[max(means)] if means else None
        current = self._epoch if epoch is None else epoch
        return means[max(earlier)] if (earlier := [e for e in means if e < current]) else None

    def update(self, sample_id: str, scores_G: Iterable[float], epoch: int | None = None) -> None:
        """Record the judge's raw scores, each in [0, 1], of one group of ``sample_id``; call once per group.

        Raises:
            ValueError: for no scores or a score outside [0, 1].
        """
        scores = list(scores_G)
        if not scores:
            raise ValueError(f"scores_G of {sample_id!r} is empty; a group without scores is dropped, not recorded")
        current = self._epoch if epoch is None else epoch
        augmented = self._profile.progress_baseline == "augmented"
        baseline = self.previous(sample_id, current) if augmented else None
        mean = sum(answer_reward(score, baseline) for score in scores) / len(scores)
        if augmented and mean == 0:
            return
        means = {**self._means.get(sample_id, {}), current: mean}
        self._means[sample_id] = {e: means[e] for e in sorted(means)[-2:]}

    def advance_epoch(self) -> None:
        """End the current epoch: what was written becomes what is read."""
        self._epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """The record as JSON types, for a checkpoint."""
        means = {sample_id: sorted(map(list, means.items())) for sample_id, means in self._means.items()}
        return {"profile": self._profile.name, "epoch": self._epoch, "means": means}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the record by one that :meth:`state_dict` returned.

        Raises:
            ValueError: if it was kept under another profile or is damaged.
        """
        if state.get("profile") != self._profile.name:
            raise ValueError(f"the record was kept under profile {state.get('profile')!r}, not {self._profile.name!r}")
        try:
            epoch = int(state["epoch"])
            means = {str(key): {int(e): float(mean) for e, mean in pairs} for key, pairs in state["means"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"the progress record is damaged: {error!r}") from error
        if epoch < 0 or not all(is_number(mean) for by_epoch in means.values() for mean in by_epoch.values()):
            raise ValueError("the progress record is damaged: a negative epoch or a mean that is no number")
        self._epoch, self._means = epoch, means
