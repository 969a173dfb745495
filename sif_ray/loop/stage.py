"""The stage `grpo`: start the actors, run the loop, keep the policy, end the actors."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from sif_ray.config import ConfigError, GrpoConfig
from sif_ray.datagen.dataset import read_samples
from sif_ray.judge.factory import check_judge
from sif_ray.learner.actor import LearnerGroup
from sif_ray.loop.evaluation import choose
from sif_ray.loop.grpo import GrpoLoop
from sif_ray.loop.ledger import Ledger
from sif_ray.loop.reward_actor import RewardActor
from sif_ray.loop.workers import ActorFactory
from sif_ray.method.progress import ProgressRecord
from sif_ray.observe.progress import Progress
from sif_ray.observe.run_folder import RunFolder
from sif_ray.policy.model import resolve_model
from sif_ray.records import Sample
from sif_ray.rollout.actor import RolloutActor
from sif_ray.runtime import ray_session

log = logging.getLogger(__name__)

REWARD_CPUS = 1.0  # logical, per reward worker


def run(config: GrpoConfig) -> None:
    """Improve `config.policy` by GRPO-SIF and write `checkpoint/`, `ledger.json`, `state/`, `metrics.jsonl` and
    `timeline.jsonl` to `config.output`.

    An earlier run in the same folder is overwritten. Raises `ConfigError` for a request that cannot work, before
    anything is started, and the first error of any part of the loop.
    """
    samples = _read(config, config.split)
    _check_plan(config, len(samples))
    eval_samples = (
        choose(_read(config, config.eval_split), config.eval_samples, config.seed) if config.eval_every else []
    )
    policy = _find_policy(config)
    check_judge(config.judge)
    folder = RunFolder(Path(config.output).resolve(), config)  # absolute: actors may have another working directory
    for name in ("metrics.jsonl", "timeline.jsonl"):  # they are appended to
        (folder.path / name).unlink(missing_ok=True)
    with ray_session(config.ray):
        _check_resources(config, ray.cluster_resources())
        asyncio.run(_run(replace(config, policy=policy), samples, eval_samples, folder))
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
    config: GrpoConfig, samples: Mapping[str, Sample], eval_samples: Sequence[Sample], folder: RunFolder
) -> None:
    ledger = make_ledger(config, list(samples))
    record = ProgressRecord(config.profile)
    learner = LearnerGroup(config)
    metrics, timeline = folder.metrics(), folder.timeline()
    try:
        total_steps = ledger.num_steps * config.objective.updates_per_batch
        with Progress("GRPO", total=ledger.num_steps, unit="steps") as progress:
            loop = GrpoLoop(
                config,
                samples,
                ledger,
                record,
                engines=_engine_factory(config),
                scorers=_scorer_factory(config, folder),
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


def _engine_factory(config: GrpoConfig) -> ActorFactory:
    def make(name: str) -> Any:
        return RolloutActor.options(num_cpus=config.engine.num_cpus, num_gpus=config.engine.num_gpus).remote(
            config.policy,
            config.engine,
            config.prompt,
            max_pixels=config.max_pixels,
            seed=config.seed + int(name.split()[-1]),
            engine_id=name,
        )

    return ActorFactory(make, start="start", shutdown="shutdown")


def _scorer_factory(config: GrpoConfig, folder: RunFolder) -> ActorFactory:
    actor = RewardActor.options(num_cpus=REWARD_CPUS)
    return ActorFactory(lambda name: actor.remote(config, str(folder.path), name.replace(" ", "-")))


# --- checks before anything is started -------------------------------------------------------------------------------


def _read(config: GrpoConfig, split: str) -> dict[str, Sample]:
    samples = {sample.sample_id: sample for sample in read_samples(config.data, split)}
    if not samples:
        raise ConfigError(f"split {split!r}: every row of it in {config.data} was refused; see its rejected/")
    blind = [name for name, sample in samples.items() if not sample.depth_image]
    if blind:
        raise ConfigError(f"data = {config.data}: {len(blind)} rows have no depth image to score with, e.g. {blind[0]}")
    return samples


def _check_plan(config: GrpoConfig, num_prompts: int) -> None:
    if round(config.epochs * num_prompts) == 0:
        raise ConfigError(f"epochs = {config.epochs:g} of {num_prompts} prompts is no prompt at all; raise it")
    if config.groups_per_step < config.learner.num_ranks:
        raise ConfigError(
            f"groups_per_step ({config.groups_per_step}) is below learner.num_ranks ({config.learner.num_ranks}); "
            "raise it, so that every rank has a group to train on"
        )


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


def _check_resources(config: GrpoConfig, total: Mapping[str, float]) -> None:
    """On a cluster of fixed size: actors that do not fit would wait forever."""
    if config.ray.address != "local":
        return
    learner, engine = config.learner, config.engine
    cpus = {
        "learner": learner.num_ranks * learner.num_cpus_per_rank,
        "engines": config.num_engines * engine.num_cpus,
        "reward workers": config.num_reward_workers * REWARD_CPUS,
    }
    gpus = {"learner": learner.num_ranks * learner.num_gpus_per_rank, "engines": config.num_engines * engine.num_gpus}
    for resource, needs in (("CPU", cpus), ("GPU", gpus)):
        needed, found = sum(needs.values()), total.get(resource, 0.0)
        if needed > found:
            parts = " + ".join(f"{count:g} {part}" for part, count in needs.items())
            raise ConfigError(
                f"{needed:g} logical {resource}s ({parts}) exceed the {found:g} of the cluster; start fewer actors or "
                "raise ray.num_cpus"
            )
