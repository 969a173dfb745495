"""Held-out evaluation: every checkpoint, every arm, every item; then numbers with intervals.

Each checkpoint has an engine of its own, started from its folder as a user would. Ray decides how many run at once: as
many as `engine.num_cpus` and `engine.num_gpus` fit on the cluster, the others wait.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sif_ray.config import ConfigError, EvaluateConfig
from sif_ray.datagen.dataset import read_samples
from sif_ray.evaluate.arms import Arm, arms
from sif_ray.evaluate.controls import donors, shown_images
from sif_ray.evaluate.metrics import TERMS, chances, majority_shares, score_text
from sif_ray.evaluate.results import Item, summarise
from sif_ray.judge.exact import ExactMatchJudge
from sif_ray.judge.scoring import read_depth_image
from sif_ray.observe.jsonl import to_line
from sif_ray.observe.progress import Progress
from sif_ray.observe.run_folder import RunFolder, write_text
from sif_ray.policy.check import check_policy
from sif_ray.records import RolloutGroup, Sample
from sif_ray.rollout.actor import RolloutActor
from sif_ray.rollout.engine import RolloutRequest
from sif_ray.runtime import ray_session
from sif_ray.toyworld.questions import CHANCE

log = logging.getLogger(__name__)

TABLE_WIDTH = 110  # characters, also where the output is a file


def run(config: EvaluateConfig) -> None:
    """Evaluate `config.checkpoints` and write results.json and items.jsonl to `config.output`.

    Raises `ConfigError` for a request that names nothing to evaluate.
    """
    if not config.checkpoints:
        raise ConfigError("checkpoints is empty; name at least one, e.g. checkpoints.warmup=runs/warmup/checkpoint")
    samples = _read(config)
    for name, folder in config.checkpoints.items():
        check_policy(folder, f"checkpoints.{name}", engine_on_cpu=not config.engine.num_gpus)
    majority = majority_shares(samples)
    designed = CHANCE if {sample.dataset for sample in samples} == {"toyworld"} else {}
    folder = RunFolder(config.output, config)

    started_s = time.monotonic()
    with ray_session(config.ray):
        by_checkpoint, timings = asyncio.run(_Evaluation(config, samples).all_checkpoints())
    items = [item for name in config.checkpoints for item in by_checkpoint[name]]
    results = summarise(
        items, list(config.checkpoints), chances(samples, designed), majority, config.bootstrap_samples, config.seed
    )
    for name, timing in timings.items():
        results["checkpoints"][name] |= timing
    results["seconds"] = time.monotonic() - started_s
    write_text(folder.path / "items.jsonl", "".join(to_line(item) for item in items))
    folder.write_json("results.json", results)
    Console(width=max(Console().width, TABLE_WIDTH)).print(table(results))
    log.info("evaluation of %d items is in %s", len(samples), folder.path)


def _read(config: EvaluateConfig) -> list[Sample]:
    samples = read_samples(config.data, config.split)
    unanswered = [sample.sample_id for sample in samples if not sample.answer.strip()]
    if unanswered:
        raise ConfigError(
            f"data = {config.data}: {len(unanswered)} rows have no answer to compare, e.g. {unanswered[0]}"
        )
    flat = [sample.sample_id for sample in samples if not sample.depth_image]
    if flat:
        raise ConfigError(f"data = {config.data}: {len(flat)} rows have no depth image to score with, e.g. {flat[0]}")
    if len({sample.scene_id for sample in samples}) < 2:
        raise ConfigError(f"split = {config.split!r}: one scene only; the blind control needs the images of a second")
    return samples


class _Evaluation:
    """The items of a run in the order of samples, arms and draws, whatever order the engines finish in."""

    def __init__(self, config: EvaluateConfig, samples: Sequence[Sample]) -> None:
        self._config = config
        self._samples = samples
        self._donors = donors(samples, config.seed)
        self._arms = arms(config)
        # The arms of an item come close together; more maps than that would not fit into memory with large images.
        self._depth_rel = functools.lru_cache(maxsize=64)(self._read_depth)
        self._judge = ExactMatchJudge()

    async def all_checkpoints(self) -> tuple[dict[str, list[Item]], dict[str, dict[str, float]]]:
        """Items and timings by checkpoint."""
        config = self._config
        total = len(config.checkpoints) * len(self._samples) * sum(arm.draws for arm in self._arms)
        with Progress("evaluate", total=total, unit="answers") as progress:
            done = await asyncio.gather(*(self._checkpoint(*entry, progress) for entry in config.checkpoints.items()))
        return (
            {name: items for name, (items, _) in zip(config.checkpoints, done, strict=True)},
            {name: timing for name, (_, timing) in zip(config.checkpoints, done, strict=True)},
        )

    async def _checkpoint(self, name: str, model: str, progress: Progress) -> tuple[list[Item], dict[str, float]]:
        engine = self._config.engine
        actor = RolloutActor.options(num_cpus=engine.num_cpus, num_gpus=engine.num_gpus).remote(
            model, engine, self._config.prompt, max_pixels=self._config.max_pixels, seed=self._config.seed
        )
        try:
            await actor.start.remote()
            started_s = time.monotonic()
            # Twice what the engine holds: it never waits for the driver, and few images are under way.
            slots = asyncio.Semaphore(2 * engine.max_num_seqs)

            async def answer(arm: Arm, index: int) -> tuple[list[Item], int]:
                async with slots:
                    group = await actor.generate.remote(self._request(arm, index))
                progress.advance(arm.draws)
                return self._scored(name, arm, index, group), group.num_tokens

            numbers = range(len(self._samples))
            done = await asyncio.gather(*(answer(arm, index) for index in numbers for arm in self._arms))
            seconds = time.monotonic() - started_s
            await actor.shutdown.remote()
        finally:
            ray.kill(actor)
        num_tokens = sum(tokens for _, tokens in done)
        timing = {"generate_s": seconds, "generated_tokens_per_s": num_tokens / seconds}
        return [item for items, _ in done for item in items], timing

    def _request(self, arm: Arm, index: int) -> RolloutRequest:
        sample, config = self._samples[index], self._config
        return RolloutRequest(
            ticket_id=f"{arm.name}-{sample.sample_id}",
            sample_id=sample.sample_id,
            question=sample.question,
            images=shown_images(sample, self._donors[index], arm.control, config.prompt.depth_image),
            num_rollouts=arm.draws,
            sampling=arm.sampling(config.max_tokens),
            seed=config.seed + index,
        )

    def _scored(self, checkpoint: str, arm: Arm, index: int, group: RolloutGroup) -> list[Item]:
        sample, config = self._samples[index], self._config
        depth_rel = self._depth_rel(index)
        return [
            {
                "checkpoint": checkpoint,
                "arm": arm.name,
                "sample_id": sample.sample_id,
                "scene_id": sample.scene_id,
                "question_type": sample.question_type,
                "draw": draw,
                "text": rollout.text,
                **score_text(sample, depth_rel, rollout.text, config.profile, config.rewards, self._judge),
            }
            for draw, rollout in enumerate(group.rollouts)
        ]

    def _read_depth(self, index: int) -> npt.NDArray[np.float64]:
        return read_depth_image(self._samples[index].depth_image, self._config.profile)


def table(results: dict[str, Any]) -> Table:
    """A short table for people: means by checkpoint and arm, then the paired differences; ± half an interval."""
    title = f"{results['num_items']} items of {results['num_scenes']} scenes, 95 % scene-level intervals"
    shown = Table(title=title, box=SIMPLE_HEAD)
    for column in ("", *TERMS):
        shown.add_column(column, no_wrap=True)
    for name, checkpoint in results["checkpoints"].items():
        shown.add_row(f"[bold]{name}")
        for arm, found in checkpoint["arms"].items():
            means = (found["means"][term] for term in TERMS)
            shown.add_row(f"  {arm}", *(_cell(f"{mean['mean']:.2f}", mean["ci95"]) for mean in means))
    if results["paired"]:
        comparison = results["comparison"]
        shown.add_row(f"[bold]{comparison['checkpoint']} - {comparison['baseline']}")
        for arm, found in results["paired"].items():
            differences = (found[term] for term in TERMS)
            shown.add_row(f"  {arm}", *(_cell(f"{pair['difference']:+.2f}", pair["ci95"]) for pair in differences))
    return shown


def _cell(value: str, ci95: Sequence[float]) -> str:
    return f"{value} ±{(ci95[1] - ci95[0]) / 2:.2f}"
