"""Supervised warm-up: the SIF dataset's traces, on the assistant's tokens only.

Ray Train places the ranks and Ray Data streams the rows to them; the step itself is that of `LearnerEngine`.
"""

from __future__ import annotations

import logging
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer

from sif_ray.config import ConfigError, WarmupConfig
from sif_ray.datagen.dataset import ACCEPTED, read_manifest
from sif_ray.learner.engine import LearnerEngine
from sif_ray.learner.rows import Scene, batches, scene_sequence, scenes, shuffled
from sif_ray.observe.metrics import MetricsLog
from sif_ray.observe.progress import Progress
from sif_ray.policy.model import resolve_model
from sif_ray.policy.processor import PolicyProcessor
from sif_ray.records import sample_from_row
from sif_ray.runtime import ray_session

log = logging.getLogger(__name__)

SHUFFLE_SCENES = 1024  # scenes a rank holds to draw from; their images are held encoded


def run(config: WarmupConfig) -> None:
    """Train `config.policy` on a split and write `<output>/checkpoint` and `<output>/metrics.jsonl`.

    Raises `ConfigError` when there is no such split, it has fewer rows than a batch, or the batch does not divide over
    the ranks.
    """
    output = Path(config.output).resolve()
    num_steps = _num_steps(config, _num_rows(config))
    output.mkdir(parents=True, exist_ok=True)
    with ray_session(config.ray):
        log.info("warm-up: %d steps of %d rows on %d ranks", num_steps, config.batch_size, config.learner.num_ranks)
        _fit(config, _rows(config), num_steps, output)
    log.info("warm-up: checkpoint in %s", output / "checkpoint")


def _num_rows(config: WarmupConfig) -> int:
    splits = read_manifest(config.data)["counts"]["splits"]
    if config.split not in splits:
        raise ConfigError(f"split = {config.split!r}: {config.data} has {', '.join(map(repr, sorted(splits)))}")
    return int(splits[config.split]["accepted"])


def _num_steps(config: WarmupConfig, num_rows: int) -> int:
    ranks = config.learner.num_ranks
    if config.batch_size % ranks:
        raise ConfigError(f"batch_size = {config.batch_size}: must divide over learner.num_ranks = {ranks}")
    if num_rows < config.batch_size:
        raise ConfigError(
            f"batch_size = {config.batch_size}: split {config.split!r} of {config.data} has {num_rows} rows; lower it"
        )
    return max(1, round(config.epochs * (num_rows // ranks // (config.batch_size // ranks))))


def _rows(config: WarmupConfig) -> ray.data.Dataset:
    ray.data.DataContext.get_current().enable_progress_bars = False
    files = sorted(str(file) for file in (Path(config.data) / ACCEPTED).glob("*.parquet"))
    return ray.data.read_parquet(files).filter(expr=ray.data.expressions.col("split") == config.split)


def _fit(config: WarmupConfig, rows: ray.data.Dataset, num_steps: int, output: Path) -> None:
    in_order = ray.train.DataConfig.default_ingest_options()
    in_order.preserve_order = True  # a seed gives the same run again
    scratch = output / "ray_train"
    shutil.rmtree(scratch, ignore_errors=True)  # Ray Train would continue a run of the same name
    trainer = _Trainer(
        _train_rank,
        train_loop_config={"config": config, "num_steps": num_steps, "output": str(output)},
        datasets={"rows": rows},
        dataset_config=ray.train.DataConfig(execution_options=in_order),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.learner.num_ranks,
            use_gpu=config.learner.num_gpus_per_rank > 0,
            resources_per_worker={
                "CPU": config.learner.num_cpus_per_rank,
                **({"GPU": config.learner.num_gpus_per_rank} if config.learner.num_gpus_per_rank else {}),
            },
        ),
        run_config=ray.train.RunConfig(name="warmup", storage_path=str(scratch)),
    )
    trainer.fit()
    shutil.rmtree(scratch)


class _Trainer(TorchTrainer):
    """A `TorchTrainer` that leaves Ctrl-C to the job.

    Ray Train's own handler of SIGINT ends the process with status 0, and stays in place after training, where it would
    swallow the Ctrl-C of every later stage.
    """

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


def _train_rank(settings: dict[str, Any]) -> None:
    """One rank, in a worker of Ray Train, which has joined the process group already."""
    config: WarmupConfig = settings["config"]
    output, num_steps = Path(settings["output"]), settings["num_steps"]
    engine = LearnerEngine(config.learner, config.policy, total_steps=num_steps, max_pixels=config.max_pixels)
    processor = PolicyProcessor(resolve_model(config.policy), config.max_pixels)
    context = ray.train.get_context()
    watch = _Watch(output, num_steps, config.batch_size) if context.get_world_rank() == 0 else None
    rows_per_rank = config.batch_size // context.get_world_size()
    for batch in _forever(config, rows_per_rank, context.get_world_rank()):
        if engine.step == num_steps:
            break
        metrics = engine.sft_step([scene_sequence(scene, processor, config.prompt) for scene in batch])
        if watch is not None:
            watch.note(engine.step, metrics)
    if watch is not None:
        watch.close()
    engine.save_policy(str(output / "checkpoint"))


def _forever(config: WarmupConfig, num_rows: int, rank: int) -> Iterator[list[Scene]]:
    """Batches of epoch after epoch. Every rank's share of an epoch has the same number of rows, hence of batches."""
    shard = ray.train.get_dataset_shard("rows")
    generator = random.Random(f"{config.seed}-{rank}")
    while True:
        samples = (sample_from_row(row) for row in shard.iter_rows())
        yield from batches(shuffled(scenes(samples), SHUFFLE_SCENES, generator), num_rows)


class _Watch:
    """Metrics and progress of the run, on one rank."""

    def __init__(self, output: Path, num_steps: int, batch_size: int) -> None:
        from sif_ray.cli import configure_logging

        configure_logging()  # a worker process; Ray shows its lines where the run was started
        path = output / "metrics.jsonl"
        path.unlink(missing_ok=True)
        self._log, self._batch_size = MetricsLog(path), batch_size
        self._progress = Progress("warm-up", total=num_steps, unit="steps").__enter__()
        self._last_s = time.monotonic()

    def note(self, step: int, metrics: dict[str, float]) -> None:
        now_s = time.monotonic()
        seconds, self._last_s = now_s - self._last_s, now_s
        rates = {"tokens_per_s": metrics["trained_tokens"] / seconds, "rows_per_s": self._batch_size / seconds}
        self._log.log(step, {**metrics, **rates})
        self._progress.advance(loss=metrics["loss"], rows_per_s=rates["rows_per_s"])

    def close(self) -> None:
        self._progress.__exit__(None, None, None)
        self._log.close()
