"""One simulated GRPO run from its seed: the real control plane on virtual time, with everything around it failing.

    seed ─► a run's settings, its faults ─► a life of the driver ─► died, stopped or failed ─► the next life ─► finished
                                             VirtualLoop: `sif_ray.loop.stage.train` with    the run folder is
                                             simulated engines, scorers, learner, judge      all that it inherits

The loop, ledger, pools, watchdog, evaluation, parity probe, checkpoints, judge caller, breaker and limits are the real
ones, and so are the files. After `FAULTY_LIVES` nothing fails any more, and the run has to come to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import logging
import math
import random
import shutil
import struct
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sif_ray.chaos.actors import (
    PING,
    SimulatedEngine,
    SimulatedFactory,
    SimulatedLearner,
    SimulatedModel,
    SimulatedScorer,
    question,
)
from sif_ray.chaos.causes import explains_failure
from sif_ray.chaos.faults import Faults, draw_rates, unsafe_files
from sif_ray.chaos.promise import Violation, promise
from sif_ray.chaos.truth import HISTORY, Truth
from sif_ray.chaos.virtual_loop import Crash, Deadlock, VirtualLoop
from sif_ray.checkpoints import CheckpointError, remove_leftovers
from sif_ray.config import EngineConfig, GrpoConfig, JudgeConfig
from sif_ray.judge.caller import Caller
from sif_ray.judge.outcome import JudgeUnavailable
from sif_ray.learner.actor import LearnerDied
from sif_ray.loop import stage
from sif_ray.loop.checkpoint import Checkpoints
from sif_ray.loop.grpo import GrpoLoop, LoopError
from sif_ray.loop.pool import PoolError
from sif_ray.loop.requests import groups_per_engine
from sif_ray.observe.run_folder import RunFolder
from sif_ray.observe.timeline import Timeline
from sif_ray.observe.trail import read_trail
from sif_ray.records import Sample
from sif_ray.toyworld.render import png

log = logging.getLogger(__name__)

FAULTY_LIVES = 6
MAX_LIVES = FAULTY_LIVES + 3  # the calm ones: at most two damaged checkpoints are removed
MAX_EVENTS = 300_000  # of one life
MORE_ENGINES = 2  # than at the beginning
FINISHED, NOTHING = "finished", "nothing to train"
SHM = Path("/dev/shm")  # checkpoints are flushed to it at no cost
CLEAN_FAILURES = (LoopError, PoolError, LearnerDied, JudgeUnavailable, OSError, CheckpointError)


@dataclass
class Outcome:
    """What became of a seed. `digest` is of every event's time: equal for equal interleavings."""

    seed: int
    violation: str = ""
    lives: list[str] = field(default_factory=list)  # how each ended
    events: int = 0
    virtual_s: float = 0.0
    faults: dict[str, int] = field(default_factory=dict)
    most_tasks: int = 0
    digest: str = ""


class Simulation:
    """All lives of one run."""

    def __init__(self, seed: int, folder: Path) -> None:
        self._rng = random.Random(f"sif_ray/simulation/{seed}")
        self._folder = folder
        self._config = draw_config(self._rng)
        rates = draw_rates(self._rng)
        self._faults = Faults(self._rng, rates)
        self._shuffle = self._rng.random() < 0.5
        prompts = self._rng.randint(1, 9)
        self._samples = {sample.sample_id: sample for sample in map(_sample, range(prompts))}
        num_engines = self._config.num_engines + (MORE_ENGINES if rates.resized else 0)
        self._truth = Truth(self._config, prompts, most_at_once(self._config, num_engines))
        self._hash = hashlib.sha256()
        self._damaged = False  # the newest checkpoint
        self._graveyard: list[VirtualLoop] = []  # whose coroutines must not be unwound yet
        self._main: asyncio.Task[None] | None = None
        self._grpo: Callable[[], GrpoLoop | None] = lambda: None
        self.outcome = Outcome(seed)

    def run(self) -> Outcome:
        """Live until the run has finished. A broken promise is in the outcome."""
        random.seed(self.outcome.seed)  # tenacity's pauses
        outcome = self.outcome
        try:
            while not self._live():
                promise(len(outcome.lives) < MAX_LIVES, f"not finished after {outcome.lives}")
                self._between_lives()
            if outcome.lives[-1] == FINISHED:
                self._truth.check_end(self._folder, self._checkpoints(), self._faults.happened)
        except Exception as error:  # noqa: BLE001  # also the checks' own: what they read is damaged
            outcome.violation = f"{type(error).__name__}: {error}"
        outcome.faults = dict(sorted(self._faults.happened.items()))
        outcome.most_tasks = self._truth.most_tasks
        outcome.digest = self._hash.hexdigest()[:16]
        return outcome

    def _live(self) -> bool:
        """One life of the driver; True when the run has finished."""
        if len(self.outcome.lives) >= FAULTY_LIVES:
            self._faults.calm()
        self._loop = VirtualLoop(  # type: ignore[abstract]  # of what asyncio never calls here
            self._rng, shuffle=self._shuffle, thread_s=0.2, after_event=self._after_event
        )
        self._events = 0
        self._faults.begin_life()
        self._truth.begin_life()
        self._graveyard.append(self._loop)
        ended = FINISHED
        try:
            with unsafe_files(self._folder, self._faults):
                self._loop.run_until_complete(self._drive())
        except (Violation, Deadlock):
            ended = "broken"
            raise
        except Crash:
            ended = "killed"
        except asyncio.CancelledError:
            ended = "stopped"
        except CLEAN_FAILURES as error:
            log.info("the run has failed: %s", error)
            no_spread = self._config.dynamic_sampling and str(error).startswith("no group could be trained")
            ended = NOTHING if no_spread and len(self.outcome.lives) >= FAULTY_LIVES else type(error).__name__
            if isinstance(error, CheckpointError):
                promise(self._damaged, f"nothing was damaged, but {error}")
            elif not no_spread:
                happened = self._faults.of_life()
                promise(explains_failure(happened, error), f"with {dict(happened)} it ended by {error!r}")
            if isinstance(error, JudgeUnavailable):
                trained, saved = len(read_trail(self._folder / stage.TRAIL)), self._checkpoints().newest_version() or 0
                promise(saved == trained, f"without a judge it ended at version {trained}, and saved {saved}")
        except BaseException as error:
            log.exception("an error that nobody expects")
            raise Violation(f"the run ended by {error!r}") from error
        finally:
            self.outcome.lives.append(ended)
            self.outcome.events += self._events
            self.outcome.virtual_s += self._loop.time()
        return ended in (FINISHED, NOTHING)

    async def _drive(self) -> None:
        self._main = asyncio.current_task()
        checkpoints = self._checkpoints()
        checkpoints.check_newest()
        remove_leftovers(self._folder, checkpoints.folder, resume=True, growing=stage.GROWING)
        faults, truth, config = self._faults, self._truth, self._config
        self._engines = SimulatedFactory(lambda name: SimulatedEngine(name, faults, truth), faults, truth)
        await stage.train(
            stage.Parts(
                config,
                self._samples,
                list(self._samples.values())[: config.eval_samples],
                RunFolder(self._folder),
                Timeline(self._folder / stage.STARTUP),
                checkpoints,
                engines=self._engines,
                scorers=SimulatedFactory(self._scorer, faults, truth),
                make_learner=lambda: SimulatedLearner(faults, truth),  # type: ignore[arg-type, return-value]
                keeps_completions=False,  # by a thread
                made=self._made,
            )
        )

    def _made(self, loop: GrpoLoop) -> None:
        self._grpo = weakref.ref(loop)  # which must be gone when it has ended
        self._truth.let_go.clear()

    def _scorer(self, name: str) -> SimulatedScorer:
        judge, workers = self._config.judge, self._config.num_reward_workers
        model = SimulatedModel(self._faults, self._truth, judge, workers)
        audit = self._folder / f"audit-{name}.jsonl"
        caller = Caller("judge", judge, "", audit, workers, question(PING), model)
        return SimulatedScorer(name, self._faults, self._truth, caller)

    def _checkpoints(self) -> Checkpoints:
        return Checkpoints(self._folder / "checkpoints", {"seed": self.outcome.seed}, self._config.checkpoints_kept)

    def _after_event(self) -> None:
        self._events += 1
        if self._events >= MAX_EVENTS:
            raise Violation(f"{MAX_EVENTS} events in {self._loop.time():.0f} s, and no end")
        self._hash.update(_DOUBLE.pack(self._loop.time()))
        self._truth.after_event(len(self._loop.tasks))
        if self._faults.any_time:
            if self._faults.happens("driver_dies"):
                raise Crash
            if self._faults.happens("told_to_stop") and self._main is not None:
                self._main.cancel()
            if self._faults.happens("asleep"):
                self._loop.jump(self._rng.expovariate(1 / 200.0))
            if self._faults.happens("resized"):
                self._resize()

    def _resize(self) -> None:
        """People add an engine, or let one go."""
        loop = self._grpo()
        names = loop.engine_names if loop is not None else []
        if loop is None or not names:  # before the run, or after it
            return
        with contextlib.suppress(ValueError):  # the run is ending, or it is the last engine
            if self._rng.random() < 0.5:
                if len(self._engines.running | set(names)) < self._config.num_engines + MORE_ENGINES:
                    loop.add_engine()
                return
            name = self._rng.choice(names)
            loop.remove_engine(name)
            self._truth.let_go[name] = math.inf if self._faults.rates.asleep else self._loop.time()

    def _between_lives(self) -> None:
        """What the disk says, and what people do: they remove what is damaged, and sometimes what is not."""
        checkpoints = self._checkpoints()
        newest = checkpoints.newest_version()
        if newest is None:
            return
        try:
            self._truth.check_checkpoint(checkpoints, newest)
        except CheckpointError as error:
            promise(self._damaged, f"nothing was damaged, but {error}")
            shutil.rmtree(checkpoints.folder.path(newest))
            self._damaged = False
            return
        if self._rng.random() < 0.1:
            shutil.rmtree(checkpoints.folder.path(newest))
        elif self._rng.random() < 0.1:
            self._damage(checkpoints.folder.path(newest))

    def _damage(self, checkpoint: Path) -> None:
        """The disk loses the end of a file or changes a byte; of the learner's files, the real learner sees that."""
        files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
        file = self._rng.choice(files)
        content = bytearray(file.read_bytes())
        at = self._rng.randrange(len(content))
        if file.name != HISTORY and self._rng.random() < 0.5:
            content[at] ^= self._rng.randrange(1, 256)
        else:
            del content[at:]
        file.write_bytes(content)
        self._damaged = True
        self._faults.happened["damaged"] += 1

    def bury(self) -> None:
        """Let go of what killed drivers left. What it does and says while it is unwound has not happened."""
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for coroutine in [task.get_coro() for loop in self._graveyard for task in loop.tasks]:
                    with contextlib.suppress(BaseException):
                        coroutine.close()
                    del coroutine
                self._graveyard.clear()
                self._loop = self._main = None  # type: ignore[assignment]
                while gc.collect():
                    pass
        finally:
            sys.unraisablehook = hook


def simulate(seed: int) -> Outcome:
    """The run of one seed, in a folder of its own that is removed."""
    parent = SHM if SHM.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="sif_ray-simulation-", dir=parent) as folder:
        simulation = Simulation(seed, Path(folder))
        outcome = simulation.run()
        simulation.bury()
    return outcome


def draw_config(rng: random.Random) -> GrpoConfig:
    """Settings of a small run, in which everything can happen."""
    group_size, lease_timeout_s, num_reward_workers = 2, rng.choice([25.0, 70.0]), rng.randint(1, 2)
    judge = JudgeConfig(
        kind="llm",
        model="simulated",
        base_url="http://simulated",
        max_concurrency=num_reward_workers * rng.choice([1, 2, 4]),
        requests_per_minute=rng.choice([0, 0, 120]),
        timeout_s=lease_timeout_s / 5,
        max_retries=rng.choice([0, 2]),
        max_wait_s=rng.choice([5.0, lease_timeout_s / 2]),
        breaker_failures=rng.choice([1, 3]),
        breaker_cooldown_s=rng.choice([1.0, 10.0]),
    )
    config = GrpoConfig(
        epochs=rng.choice([1.0, 1.5, 2.0]),
        groups_per_step=rng.randint(1, 4),
        group_size=group_size,
        max_staleness=rng.choice([0, 1, 1, 2, 3]),
        dynamic_sampling=rng.random() < 0.2,
        lease_timeout_s=lease_timeout_s,
        stuck_after_s=rng.choice([0.0, 2 * lease_timeout_s, 2 * lease_timeout_s]),
        num_engines=rng.randint(1, 3),
        num_reward_workers=num_reward_workers,
        eval_every=rng.choice([0, 0, 2]),
        eval_samples=2,
        checkpoint_every=rng.choice([0, 1, 2]),
        checkpoints_kept=rng.choice([1, 2]),
        trackers=[],
        parity_every=rng.choice([1, 3]),
        judge=judge,
        engine=EngineConfig(max_num_seqs=group_size * rng.choice([1, 2])),
        seed=rng.randrange(1000),
    )
    config.placement.colocate = rng.random() < 0.1
    return config


def most_at_once(config: GrpoConfig, num_engines: int) -> dict[str, int]:
    """What one life may need at a time: twice the groups under way or waiting, as leases may expire; twice a few tasks
    for each of those, each worker, each part of the loop. What leaks grows beyond any multiple."""
    most = groups_per_engine(config.engine.max_num_seqs, config.group_size)
    groups = num_engines * (most + 1) + config.groups_per_step * (config.max_staleness + 2)
    workers = num_engines + config.num_reward_workers
    tasks = 2 * (20 + 6 * workers + (6 + 2 * config.group_size) * (groups + config.eval_samples))
    return {"tasks": tasks, "groups": 2 * groups}


_DOUBLE = struct.Struct("d")
_IMAGE = png(np.zeros((8, 8, 3), np.uint8))


def _sample(number: int) -> Sample:
    name = f"p{number}"
    return Sample(name, name, "toy", "grpo", "What?", "", "x", (), 8, 8, _IMAGE, _IMAGE, "exact", "image")


def quiet() -> None:
    """No log lines, no warnings of what killed drivers did not await, and no walks of the collector over what was there
    before: for many seeds in one process."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore", RuntimeWarning)
    gc.collect()
    gc.freeze()
