"""One rank of the warm-up, in a worker of Ray Train: from the newest checkpoint, or the beginning, to the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.data
import torch.distributed as dist

from sif_ray.checkpoints import CheckpointFolder
from sif_ray.config import WarmupConfig
from sif_ray.learner.engine import LearnerEngine, LearnerError
from sif_ray.learner.rows import Share
from sif_ray.learner.stream import Feed, RowStream
from sif_ray.observe.logs import configure_logging
from sif_ray.observe.metrics import MetricsLog
from sif_ray.observe.progress import Progress
from sif_ray.observe.trail import Trail

LEARNER, METRICS, TRAIL, STOP = "learner", "metrics.jsonl", "trained.jsonl", ".stop"


@dataclass(frozen=True)
class WarmupJob:
    """What every rank is told."""

    config: WarmupConfig
    policy: str
    output: Path
    settings: Mapping[str, Any]  # of the checkpoints
    num_steps: int
    train: RowStream
    evaluation: RowStream | None

    @property
    def checkpoints(self) -> CheckpointFolder:
        return CheckpointFolder(self.output / "checkpoints", self.settings, self.config.checkpoints_kept)

    @property
    def stop_file(self) -> Path:
        """While it is there, ranks save a checkpoint after their step and end."""
        return self.output / STOP


def train_rank(job: WarmupJob) -> None:
    """Train until the last step or until the stop file is there."""
    configure_logging()  # a worker process; Ray shows its lines where the run was started
    _Rank(job).run()


class _Rank:
    def __init__(self, job: WarmupJob) -> None:
        self._job, self._config = job, job.config
        self._engine = LearnerEngine(
            job.config.learner, job.policy, total_steps=job.num_steps, max_pixels=job.config.max_pixels
        )
        self._is_first = dist.get_rank() == 0
        self._checkpoints = job.checkpoints
        self._best: dict[str, float] | None = None  # {"step", "eval_loss"} of the policy in checkpoint/
        self._num_skipped = 0
        newest = self._checkpoints.newest()
        if newest is not None:
            state = self._checkpoints.read(newest)
            self._best, self._num_skipped = state["best"], state["skipped"]
            self._engine.load_checkpoint(str(self._checkpoints.path(newest) / LEARNER))
        dist.barrier()  # nobody writes a checkpoint before everybody has found this one

    def run(self) -> None:
        job, engine = self._job, self._engine
        feed = Feed(self._iterator(job.train, engine.step, job.num_steps))
        evaluation = job.evaluation and self._iterator(job.evaluation, 0, job.evaluation.num_steps)
        with _Watch(job, engine.step) if self._is_first else contextlib.nullcontext() as watch:
            stops = False
            while engine.step < job.num_steps and not stops:
                started_s = time.monotonic()
                share = feed.take(engine.step)
                waited_s = time.monotonic() - started_s
                sample_ids, stops = self._gather(share)
                metrics = engine.sft_step(share.sequences)
                seconds = time.monotonic() - started_s
                metrics |= {
                    "rows_per_s": len(sample_ids) / seconds,
                    "tokens_per_s": metrics["trained_tokens"] / seconds,
                    "data_wait_s": waited_s,
                    "skipped_rows": self._num_skipped,
                }
                is_last = engine.step == job.num_steps
                if evaluation is not None and (is_last or engine.step % self._config.eval_every == 0):
                    metrics["eval_loss"] = self._evaluate(evaluation)
                elif is_last:
                    self._save_policy()
                if watch is not None:
                    watch.note(engine.step, sample_ids, metrics)
                if stops or is_last or self._checkpoint_is_due():
                    self._save_checkpoint()

    def _iterator(self, stream: RowStream, first_step: int, num_steps: int) -> ray.data.DataIterator:
        """This rank's part of one stream of all ranks."""
        num_ranks = dist.get_world_size()
        parts: list[Any] = [None] * num_ranks
        if self._is_first:
            parts = stream.dataset(first_step, num_steps, num_ranks).streaming_split(num_ranks, equal=False)
        dist.broadcast_object_list(parts, src=0)
        return parts[dist.get_rank()]

    def _gather(self, share: Share) -> tuple[list[str], bool]:
        """The samples of all ranks in a step, and whether the run is to stop after it."""
        mine = (share.sample_ids, len(share.skipped_ids), self._is_first and self._job.stop_file.exists())
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, mine)
        sample_ids = [sample_id for ids, _, _ in told for sample_id in ids]
        if not sample_ids:
            raise self._all_too_long(f"the batch of step {self._engine.step + 1}")
        self._num_skipped += sum(skipped for _, skipped, _ in told)
        return sample_ids, any(stops for _, _, stops in told)

    def _evaluate(self, iterator: ray.data.DataIterator) -> float:
        """Mean of -log p over all predicted tokens of the photographs that were held back; the policy with the lowest
        so far is kept."""
        feed = Feed(iterator)
        parts = [self._engine.sft_loss(feed.take(step).sequences) for step in range(self._job.evaluation.num_steps)]
        total_tokens = sum(num_tokens for _, num_tokens in parts)
        if total_tokens == 0:
            raise self._all_too_long("the evaluation")
        eval_loss = sum(loss for loss, _ in parts) / total_tokens
        if self._best is None or eval_loss < self._best["eval_loss"]:
            self._best = {"step": self._engine.step, "eval_loss": eval_loss}
            self._save_policy()
        return eval_loss

    def _all_too_long(self, where: str) -> LearnerError:
        return LearnerError(
            f"{where}: each of its rows has more than max_length = {self._config.max_length} tokens; raise it or lower "
            "max_pixels"
        )

    def _checkpoint_is_due(self) -> bool:
        every = self._config.checkpoint_every
        return every > 0 and self._engine.step % every == 0

    def _save_policy(self) -> None:
        self._engine.save_policy(str(self._job.output / "checkpoint"))
        if self._config.learner.lora.rank:
            self._engine.save_adapter(str(self._job.output / "adapter"), self._config.policy)

    def _save_checkpoint(self) -> None:
        step = self._engine.step
        if self._is_first:
            self._checkpoints.begin(step)
        dist.barrier()
        self._engine.save_checkpoint(str(self._checkpoints.part(step) / LEARNER), {"step": step})
        if self._is_first:
            self._checkpoints.complete(step, {"best": self._best, "skipped": self._num_skipped})
        dist.barrier()


class _Watch:
    """Metrics, trail and progress of the run, on one rank."""

    def __init__(self, job: WarmupJob, step: int) -> None:
        self._stack = contextlib.ExitStack()
        self._metrics = self._stack.enter_context(MetricsLog(job.output / METRICS))
        self._trail = self._stack.enter_context(contextlib.closing(Trail(job.output / TRAIL, continue_from=step)))
        self._progress = self._stack.enter_context(Progress("warm-up", total=job.num_steps, unit="steps", done=step))

    def note(self, step: int, sample_ids: list[str], metrics: Mapping[str, float]) -> None:
        """A step is done."""
        self._trail.trained(step, sample_ids)
        self._metrics.log(step, metrics)
        shown = {name: metrics[name] for name in ("loss", "eval_loss", "rows_per_s") if name in metrics}
        self._progress.advance(**shown)

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)
