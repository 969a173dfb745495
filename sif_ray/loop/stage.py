"""The stage `grpo`: start the actors, run the loop, keep the policy, end the actors."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sif_ray.config import ConfigError, GrpoConfig, validate
from sif_ray.datagen.dataset import read_samples
from sif_ray.judge.factory import check_judge
from sif_ray.learner.actor import LearnerGroup
from sif_ray.loop.evaluation import choose
from sif_ray.loop.grpo import GrpoLoop
from sif_ray.loop.ledger import Ledger
from sif_ray.loop.reservation import Reservation, reserved
from sif_ray.loop.reward_actor import RewardActor
from sif_ray.loop.workers import ActorFactory
from sif_ray.method.progress import ProgressRecord
from sif_ray.observe.progress import Progress
from sif_ray.observe.run_folder import RunFolder
from sif_ray.policy.model import resolve_model
from sif_ray.records import Sample
from sif_ray.resources.plan import make_plan
from sif_ray.rollout.actor import RolloutActor
from sif_ray.runtime import ray_session

log = logging.getLogger(__name__)


def run(config: GrpoConfig) -> None:
    """Improve `config.policy` by GRPO-SIF and write `checkpoint/`, `ledger.json`, `state/`, `metrics.jsonl` and
    `timeline.jsonl` to `config.output`.

    An earlier run in the same folder is overwritten. Raises `ConfigError` for a request that cannot work, before
    anything is started, and the first error of any part of the loop.
    """
    validate(config)
    plan = make_plan(config)
    samples = _read(config, config.split)
    if round(config.epochs * len(samples)) == 0:
        raise ConfigError(f"epochs = {config.epochs:g} of {len(samples)} prompts is no prompt at all; raise it")
    eval_samples = (
        choose(_read(config, config.eval_split), config.eval_samples, config.seed) if config.eval_every else []
    )
    policy = _find_policy(config)
    check_judge(config.judge)
    folder = RunFolder(Path(config.output).resolve(), config)  # absolute: actors may have another working directory
    for name in ("metrics.jsonl", "timeline.jsonl"):  # they are appended to
        (folder.path / name).unlink(missing_ok=True)
    can_grow = config.ray.address != "local"
    with (
        ray_session(config.ray),
        reserved(plan.layout, timeout_s=config.placement.timeout_s, can_grow=can_grow) as room,
    ):
        asyncio.run(_run(replace(config, policy=policy), samples, eval_samples, folder, room))
    log.info("the policy is in %s", folder.path / "checkpoint")


def make_ledger(config: GrpoConfig, sample_ids: list[str]) -> Ledger:
    """The ledger of a run, on the clock of this process."""
    return Ledger(
        sample_ids,
        epochs=config.epochs,
        groups_per_step=config.groups_per_step,
        max_staleness=config.max_staleness,
        lease_timeout_s=config.lease_timeout_s,
        now_s=time.monotonic,
        seed=config.seed,
        max_steps=config.max_steps,
    )


async def _run(
    config: GrpoConfig,
    samples: Mapping[str, Sample],
    eval_samples: Sequence[Sample],
    folder: RunFolder,
    room: Reservation,
) -> None:
    ledger = make_ledger(config, list(samples))
    record = ProgressRecord(config.profile)
    learner = LearnerGroup(config, room.options)
    metrics, timeline = folder.metrics(), folder.timeline()
    try:
        total_steps = ledger.num_steps * config.objective.updates_per_batch
        with Progress("GRPO", total=ledger.num_steps, unit="steps") as progress:
            loop = GrpoLoop(
                config,
                samples,
                ledger,
                record,
                engines=_engine_factory(config, room),
                scorers=_scorer_factory(config, folder, room),
                learner=learner,
                metrics=metrics,
                timeline=timeline,
                progress=progress,
                eval_samples=eval_samples,
            )
            await loop.run(learner_ready=learner.start(total_steps))
        await learner.save_policy(str(folder.path / "checkpoint"))
        (folder.path / "state").mkdir(exist_ok=True)
        folder.write_json("state/progress.json", record.state_dict())
        folder.write_json("ledger.json", ledger.state_dict() | {"counts": ledger.counts()})
    finally:
        metrics.close()
        timeline.close()
        learner.shutdown()


def _engine_factory(config: GrpoConfig, room: Reservation) -> ActorFactory:
    def make(name: str) -> Any:
        return RolloutActor.options(**room.options(name)).remote(
            config.policy,
            config.engine,
            config.prompt,
            max_pixels=config.max_pixels,
            seed=config.seed + int(name.split()[-1]),
            engine_id=name,
        )

    return ActorFactory(make, start="start", shutdown="shutdown")


def _scorer_factory(config: GrpoConfig, folder: RunFolder, room: Reservation) -> ActorFactory:
    def make(name: str) -> Any:
        return RewardActor.options(**room.options(name)).remote(config, str(folder.path), name.replace(" ", "-"))

    return ActorFactory(make)


# --- checks before anything is started -------------------------------------------------------------------------------


def _read(config: GrpoConfig, split: str) -> dict[str, Sample]:
    samples = {sample.sample_id: sample for sample in read_samples(config.data, split)}
    if not samples:
        raise ConfigError(f"split {split!r}: every row of it in {config.data} was refused; see its rejected/")
    blind = [name for name, sample in samples.items() if not sample.depth_image]
    if blind:
        raise ConfigError(f"data = {config.data}: {len(blind)} rows have no depth image to score with, e.g. {blind[0]}")
    return samples


def _find_policy(config: GrpoConfig) -> str:
    try:
        folder = Path(resolve_model(config.policy)).resolve()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"policy = {config.policy!r} is neither a folder nor a model that the hub gives ({type(error).__name__}); "
            "run the stage warmup first or name a checkpoint folder"
        ) from error
    if not (folder / "config.json").is_file():
        raise ConfigError(f"policy = {config.policy!r}: {folder} has no config.json; name a Hugging Face checkpoint")
    return str(folder)
