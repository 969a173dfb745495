"""The Ray shell around a rewarder and its judge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ray

from sif_ray.config import GrpoConfig
from sif_ray.judge.factory import make_judge
from sif_ray.loop.rewarder import GroupScores, Rewarder, ScoringFailed
from sif_ray.observe.stacks import thread_stacks
from sif_ray.records import Sample

MAX_CALLS = 4096  # groups that wait on the judge at once; its own limits are in config.judge


@ray.remote(max_concurrency=MAX_CALLS, concurrency_groups={"stacks": 1})
class RewardActor:
    """`Rewarder` in a process of its own, which also keeps the judge's connections.

    `folder` is that of the run: an LLM judge writes to `judge/` in it. `worker` names this worker in it.
    """

    def __init__(self, config: GrpoConfig, folder: str, worker: str) -> None:
        judge = make_judge(config.judge, Path(folder) / "judge", worker, config.num_reward_workers)
        self._rewarder = Rewarder(config.rewards, config.profile, judge)

    async def score(
        self, texts_G: Sequence[str], sample: Sample, previous: float | None
    ) -> GroupScores | ScoringFailed:
        """See `Rewarder.score`."""
        return await self._rewarder.score(texts_G, sample, previous)

    async def metrics(self) -> dict[str, float]:
        """See `Rewarder.metrics`."""
        return self._rewarder.metrics()

    @ray.method(concurrency_group="stacks")
    async def stacks(self) -> str:
        """Where this process is. Answers from a thread of its own, also when the event loop of the calls is blocked."""
        return thread_stacks()
