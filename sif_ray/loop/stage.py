"""The stage `grpo`: find where to start, run the loop, keep the policy.

    read and check ─► newest checkpoint or the beginning ─► loop ─► policy, finished.json
                              ▲                              │
                              ├── a learner rank died ───────┤
                              └── the next run of the stage ─┴── SIGTERM, Ctrl-C: the step ends and is saved
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from sif_ray import config as configuration
from sif_ray.checkpoints import FINISHED, CheckpointError, finished_before, remove_leftovers
from sif_ray.clock import now_s
from sif_ray.config import ConfigError, GrpoConfig, validate
from sif_ray.datagen.dataset import read_samples
from sif_ray.judge.factory import check_judge
from sif_ray.learner.actor import LearnerDied, LearnerGroup
from sif_ray.loop.checkpoint import Checkpoints, run_settings
from sif_ray.loop.evaluation import choose
from sif_ray.loop.grpo import GrpoLoop, LoopError
from sif_ray.loop.ledger import Ledger
from sif_ray.loop.pool import Factory
from sif_ray.loop.reservation import Reservation, reserved
from sif_ray.loop.reward_actor import RewardActor
from sif_ray.loop.workers import ActorFactory
from sif_ray.method.progress import ProgressRecord
from sif_ray.observe.completions import CompletionLog
from sif_ray.observe.metrics import MetricsLog
from sif_ray.observe.progress import Progress
from sif_ray.observe.run_folder import RunFolder, kept_to_itself
from sif_ray.observe.timeline import Timeline
from sif_ray.observe.trackers import IDS_FILE, check_trackers, open_trackers
from sif_ray.observe.trail import Trail
from sif_ray.policy.check import check_policy, check_training_room
from sif_ray.records import Sample, ScoredGroup
from sif_ray.resources.object_store import check_object_store
from sif_ray.resources.plan import make_plan
from sif_ray.rollout.actor import RolloutActor
from sif_ray.runtime import ray_session, saving_time_s

log = logging.getLogger(__name__)

MAX_LEARNER_DEATHS = 3  # without a new checkpoint between them; after one more the run fails
TRAIL = "trained.jsonl"
STARTUP = "startup.jsonl"  # timeline of what was started; this process is the lane "driver"
DRIVER_STARTS = ("process", "checks", "Ray", "room")  # imports, refusals, the cluster, places on it
# What grows while the run does, and is continued after a resume.
GROWING = (
    *("metrics.jsonl", "timeline.jsonl", STARTUP, TRAIL),
    *("completions.jsonl", "completions", "tensorboard", IDS_FILE),
)


@dataclass(frozen=True)
class Parts:
    """What a run is made of, however often its actors are started."""

    config: GrpoConfig
    samples: Mapping[str, Sample]  # by sample id
    eval_samples: Sequence[Sample]
    folder: RunFolder
    startup: Timeline
    checkpoints: Checkpoints
    engines: Factory
    scorers: Factory
    make_learner: Callable[[], LearnerGroup]
    keeps_completions: bool = True  # the best and worst of each step, drawn by a thread
    made: Callable[[GrpoLoop], None] = lambda loop: None  # is given every loop, to add and remove engines


def run(config: GrpoConfig) -> None:
    """Improve `config.policy` by GRPO-SIF. Writes to `config.output`: `checkpoint/` (the policy, Hugging Face layout),
    `metrics.jsonl`, `timeline.jsonl`, `startup.jsonl`, `trained.jsonl` (`sif_ray.observe.trail`), `checkpoints/`
    (`sif_ray.loop.checkpoint`) and, last, `finished.json` with the counts of the ledger.

    A run that was interrupted in the same folder is continued from its newest checkpoint, one that finished is left as
    it is; `config.resume` = False starts over. Raises `ConfigError` for a request that cannot work, also when the
    folder holds a run with other settings, before anything is started, and the first error of any part of the loop.
    """
    moments_s = [psutil.Process().create_time(), time.time()]
    validate(config)
    plan = make_plan(config)
    samples = _read(config, config.split)
    if round(config.epochs * len(samples)) == 0:
        raise ConfigError(f"epochs = {config.epochs:g} of {len(samples)} prompts is no prompt at all; raise it")
    eval_samples = (
        choose(_read(config, config.eval_split), config.eval_samples, config.seed) if config.eval_every else []
    )
    check_object_store(config, plan.shape.num_parameters if plan.shape else None, samples.values())
    policy = check_policy(config.policy, engine_on_cpu=not config.engine.num_gpus)
    on_nodes = policy if Path(config.policy).is_dir() else config.policy  # of a hub or a store each has its own copy
    if config.learner.lora.adapter:
        from sif_ray.policy.adapter import starting_adapter  # imports peft

        starting_adapter(config.learner.lora, policy)
    check_training_room(config.output, policy, config.learner, config.checkpoints_kept)
    check_trackers(config.trackers)
    output = Path(config.output).resolve()  # absolute: actors may have another working directory
    settings = run_settings(replace(config, policy=policy), samples.values())
    checkpoints = Checkpoints(output / "checkpoints", settings, config.checkpoints_kept)
    if config.resume:
        if finished_before(output, settings):
            return
        checkpoints.check_newest()
    check_judge(config.judge)
    can_grow = not config.ray.local
    moments_s.append(time.time())
    with kept_to_itself(output), ray_session(config.ray):
        moments_s.append(time.time())
        with reserved(plan.layout, timeout_s=config.placement.timeout_s, can_grow=can_grow) as room:
            moments_s.append(time.time())
            remove_leftovers(output, checkpoints.folder, config.resume, GROWING)
            folder = RunFolder(output, config)
            with contextlib.closing(Timeline(output / STARTUP)) as startup:
                for what, (start_s, end_s) in zip(DRIVER_STARTS, pairwise(moments_s), strict=True):
                    startup.span("driver", "start", start_s, end_s, what=what)
                parts = Parts(
                    config,
                    samples,
                    eval_samples,
                    folder,
                    startup,
                    checkpoints,
                    engines=_engine_factory(config, on_nodes, room, startup),
                    scorers=_scorer_factory(config, output, room, startup),
                    make_learner=lambda: LearnerGroup(replace(config, policy=on_nodes), room.options),
                )
                asyncio.run(train(parts))
    log.info("the policy is in %s", output / "checkpoint")


def make_ledger(config: GrpoConfig, sample_ids: list[str]) -> Ledger:
    """The ledger of a run, on the clock of the event loop."""
    return Ledger(
        sample_ids,
        epochs=config.epochs,
        groups_per_step=config.groups_per_step,
        max_staleness=config.max_staleness,
        lease_timeout_s=config.lease_timeout_s,
        now_s=now_s,
        seed=config.seed,
        max_steps=config.max_steps,
    )


async def train(parts: Parts) -> None:
    """Train to the end. When a learner rank dies, everything starts again from the newest checkpoint."""
    settings = {key: value for key, (value, _) in configuration.differences(parts.config).items()}
    deaths: Counter[int] = Counter()  # by the step from which the next learner goes on
    with (
        parts.folder.metrics(open_trackers(parts.config.trackers, parts.folder.path, settings)) as metrics,
        contextlib.closing(parts.folder.timeline()) as timeline,
    ):
        while True:
            learner = parts.make_learner()
            try:
                return await _train_from_checkpoint(parts, learner, metrics, timeline)
            except Exception as error:
                death = await _learner_death(learner, error)
                version = parts.checkpoints.newest_version() or 0
                deaths[version] += 1
                if death is None or deaths[version] > MAX_LEARNER_DEATHS:
                    raise
                again = f"(death {deaths[version]} of a learner there)"
                log.warning("the run starts again from step %d %s: %s", version, again, death)
                del death  # with the frames in it, which hold the loop that has ended and its weights
            finally:
                learner.shutdown()


async def _learner_death(learner: LearnerGroup, error: Exception) -> LearnerDied | None:
    """The death of a rank behind an error: an engine may be the first to miss what the rank was to send."""
    if isinstance(error, LearnerDied):
        return error
    try:
        await learner.check_alive()
    except LearnerDied as death:
        return death
    return None


async def _train_from_checkpoint(parts: Parts, learner: LearnerGroup, metrics: MetricsLog, timeline: Timeline) -> None:
    """From the newest checkpoint, or the beginning, to the finished policy."""
    config, samples, checkpoints = parts.config, parts.samples, parts.checkpoints
    ledger = make_ledger(config, list(samples))
    record = ProgressRecord(config.profile)
    groups: Mapping[str, ScoredGroup] = {}
    version = checkpoints.newest_version()
    if version is not None:
        state = checkpoints.load(version, lambda sample_id: samples[sample_id].prompt_images(config.prompt.depth_image))
        ledger.load_state_dict(state.ledger)
        record.load_state_dict(state.record)
        groups = state.groups
        log.info("continuing from step %d of %d with %d scored groups", version, ledger.num_steps, len(groups))
    learner_is_up = asyncio.Event()

    async def start_learner() -> None:
        started_s = time.time()
        await learner.start(ledger.num_steps * config.objective.updates_per_batch)
        if version is not None:
            loaded = await learner.load_checkpoint(checkpoints.learner_folder(version))
            if loaded != {"version": version}:
                raise CheckpointError(f"{checkpoints.learner_folder(version)} holds {loaded}, not version {version}")
        parts.startup.span("learner 0", "start", started_s, time.time())
        learner_is_up.set()

    with (
        contextlib.closing(Trail(parts.folder.path / TRAIL, continue_from=ledger.version)) as trail,
        _completion_log(parts, ledger.num_steps) as completions,
        Progress("GRPO", total=ledger.num_steps, unit="steps", done=ledger.version) as progress,
    ):
        loop = GrpoLoop(
            config,
            samples,
            ledger,
            record,
            engines=parts.engines,
            scorers=parts.scorers,
            learner=learner,
            metrics=metrics,
            timeline=timeline,
            trail=trail,
            save=lambda state: checkpoints.save(state, learner),
            groups=groups,
            progress=progress,
            completions=completions,
            eval_samples=parts.eval_samples,
        )
        parts.made(loop)
        await _run_or_stop(loop, start_learner(), learner_is_up)
    await _save_policy(learner, parts.folder.path / "checkpoint", config.stuck_after_s)
    finished = {"version": ledger.version, "counts": ledger.counts(), "dropped": ledger.dropped()}
    parts.folder.write_json(FINISHED, finished | {"settings": checkpoints.settings})


async def _save_policy(learner: LearnerGroup, folder: Path, stuck_after_s: float) -> None:
    try:
        async with asyncio.timeout(stuck_after_s or None):
            await learner.save_policy(str(folder))
    except TimeoutError:
        raise LoopError(
            f"the learner is stuck: it has not written the policy to {folder} within stuck_after_s = "
            f"{stuck_after_s:g}; nothing is lost, run again to write it from the last checkpoint"
        ) from None


async def _run_or_stop(loop: GrpoLoop, learner_ready: Awaitable[None], learner_is_up: asyncio.Event) -> None:
    """Run the loop to its end; when cancelled, to the end of its step, within `saving_time_s`."""
    running = asyncio.create_task(loop.run(learner_ready))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        if learner_is_up.is_set():
            log.info("stopping after this step, within %g s; interrupt again to stop at once", saving_time_s())
            loop.stop()
            await asyncio.wait([running], timeout=saving_time_s())
        if running.done() and not running.cancelled() and (error := running.exception()) is not None:
            log.error("the step was not saved: %r", error)
        raise
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def _completion_log(parts: Parts, num_steps: int) -> AbstractContextManager[CompletionLog | None]:
    if not parts.keeps_completions:
        return contextlib.nullcontext()
    return contextlib.closing(CompletionLog(parts.folder.path, parts.samples, num_steps))


def _engine_factory(config: GrpoConfig, policy: str, room: Reservation, startup: Timeline) -> ActorFactory:
    def make(name: str) -> Any:
        return RolloutActor.options(**room.options(name)).remote(
            policy,
            config.engine,
            config.prompt,
            max_pixels=config.max_pixels,
            seed=config.seed + int(name.split()[-1]),
            engine_id=name,
        )

    return ActorFactory(make, start="start", shutdown="shutdown", timeline=startup)


def _scorer_factory(config: GrpoConfig, folder: Path, room: Reservation, startup: Timeline) -> ActorFactory:
    def make(name: str) -> Any:
        return RewardActor.options(**room.options(name)).remote(config, str(folder), name.replace(" ", "-"))

    return ActorFactory(make, timeline=startup)


# --- checks before anything is started -------------------------------------------------------------------------------


def _read(config: GrpoConfig, split: str) -> dict[str, Sample]:
    samples = {sample.sample_id: sample for sample in read_samples(config.data, split)}
    if not samples:
        raise ConfigError(f"split {split!r}: every row of it in {config.data} was refused; see its rejected/")
    blind = [name for name, sample in samples.items() if not sample.depth_image]
    if blind:
        raise ConfigError(f"data = {config.data}: {len(blind)} rows have no depth image to score with, e.g. {blind[0]}")
    return samples
