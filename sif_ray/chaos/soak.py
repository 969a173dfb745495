"""The job `chaos soak`: training and serving under load for as long as wanted, with parts that fail at random, and
whether what they hold of the machine stays what it is."""

from __future__ import annotations

import argparse
import contextlib
import logging
import random
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from sif_ray.bench.findings import Findings, Goal, spread
from sif_ray.bench.watch import Watch
from sif_ray.chaos.endpoint import COME_BACK, Endpoint, Load
from sif_ray.chaos.footprint import Footprint
from sif_ray.chaos.process_tree import ENGINE, LOG, ProcessTree, stopped
from sif_ray.chaos.promise import Violation
from sif_ray.chaos.scenarios import make_victim
from sif_ray.chaos.soak_figure import TITLES, soak_svg
from sif_ray.chaos.victim import DRIVER, LEARNER, REWARD_WORKER, ROLLOUT_ACTOR, Victim
from sif_ray.config import ConfigError, EngineConfig, ServeConfig
from sif_ray.loop.pool import MAX_RESTARTS, RESTART_WINDOW_S
from sif_ray.observe.progress import Progress
from sif_ray.ports import free_port

log = logging.getLogger(__name__)

SAMPLE_EVERY_S = 10.0
QUIET_S = (20.0, 60.0)  # between the recovery from a fault and the next one
RECOVERY_TIMEOUT_S = 600.0
STANDS_STILL_S = 15.0
ANSWERS = 3  # after which a fault of the endpoint counts as overcome
WARM_UP = 0.25  # share of the time that does not count for growth
LEAST_MINUTES = 2
MOST_GROWTH = 0.05
MOST_GAPS = 0.1  # share of samples in which a cluster says nothing of itself
EPOCHS = 500  # of a run that is stopped long before
MIDDLE = {"object_store_mb": statistics.fmean}  # how many versions of the weights are in it changes with every step
LEAST = {"object_store_mb": 100.0}  # so that one more version of 7 MB is growth, and a part of one is not


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sif-ray chaos soak`."""
    parser.add_argument("--minutes", metavar="N", type=float, default=60.0, help="how long (default: 60)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of what fails when (default: 0)")
    parser.add_argument(
        "--json", metavar="OUT", type=Path, help="file for the figures; a picture and logs are put beside it"
    )


def run(options: argparse.Namespace) -> int:
    """Soak. Returns 1 when a promise was broken or something grew."""
    if options.minutes < LEAST_MINUTES:
        raise ConfigError(f"--minutes = {options.minutes:g} must be at least {LEAST_MINUTES}, or growth says nothing")
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sif_ray-chaos-") as name:
        findings = soak(Path(name), 60 * options.minutes, options.seed)
        if options.json:
            findings.write(options.json, "soak", time.monotonic() - started_s)
            for part in (TRAINING, SERVING):
                shutil.copy(Path(name) / part / LOG, options.json.with_suffix(f".{part}.log"))
    for goal in findings.goals:
        log.log(logging.INFO if goal.ok else logging.ERROR, goal.told())
    return int(not all(goal.ok for goal in findings.goals))


TRAINING, SERVING = "training", "serving"


@dataclass(frozen=True)
class Fault:
    """A process of one of the two is killed, or stands still for `STANDS_STILL_S`; all goes on all the same."""

    tree: str
    title: str  # in the command line of the process
    kills: bool
    of: str  # for people
    place: str = ""  # of the run that loses its worker

    @property
    def name(self) -> str:
        return f"{self.tree}: {self.of} {'killed' if self.kills else 'stands still'}"


FAULTS = [
    Fault(TRAINING, ENGINE, True, "engine", place="engine"),
    Fault(TRAINING, ENGINE, False, "engine"),
    Fault(TRAINING, ROLLOUT_ACTOR, True, "rollout actor", place="engine"),
    Fault(TRAINING, REWARD_WORKER, True, "reward worker", place="scorer"),
    Fault(TRAINING, LEARNER, True, "learner"),
    Fault(TRAINING, LEARNER, False, "learner"),
    Fault(TRAINING, DRIVER, False, "driver"),
    Fault(SERVING, ENGINE, True, "engine"),
    Fault(SERVING, ENGINE, False, "engine"),
    Fault(SERVING, "ray::ServeReplica:sif:Gateway", True, "gateway"),
    Fault(SERVING, "ray::ServeReplica:sif:Depth", True, "depth worker"),
    Fault(SERVING, "ray::ServeController", True, "controller of Serve"),
]


@dataclass(frozen=True)
class Strike:
    """A fault that happened, and when all was well again, by time.monotonic."""

    fault: Fault
    struck_s: float
    recovered_s: float


def bearable_faults(strikes: Sequence[Strike], now_s: float) -> list[Fault]:
    """All but those of a place that has lost as many workers as a run puts up with."""
    lost = Counter(strike.fault.place for strike in strikes if strike.struck_s > now_s - RESTART_WINDOW_S)
    return [fault for fault in FAULTS if not fault.place or lost[fault.place] < MAX_RESTARTS]


class Footprints(Watch):
    """What both hold, every few seconds."""

    def __init__(self, trees: dict[str, ProcessTree]) -> None:
        super().__init__(SAMPLE_EVERY_S)
        self._trees = trees
        self.times_s: list[float] = []
        self.by_tree: dict[str, list[Footprint]] = {name: [] for name in trees}

    def sample(self) -> None:
        found = {name: Footprint.of(tree) for name, tree in self._trees.items()}
        self.times_s.append(time.monotonic())
        for name, held in found.items():
            self.by_tree[name].append(held)


class Soak:
    """Training and serving under load, each overcoming a fault before the next."""

    def __init__(self, victim: Victim, endpoint: Endpoint, seed: int) -> None:
        self._victim, self._endpoint = victim, endpoint
        self._rng = random.Random(f"sif_ray/soak/{seed}")
        self.trees: dict[str, ProcessTree] = {TRAINING: victim, SERVING: endpoint}
        self.load = Load(endpoint, clients=2, seed=seed)
        self.watch = Footprints(self.trees)
        self.strikes: list[Strike] = []
        self.broken = ""  # the first promise that was

    def run(self, seconds: float) -> None:
        """For so long, or until a promise is broken."""
        with contextlib.ExitStack() as last:
            for tree in self.trees.values():
                last.callback(tree.end)
            try:
                self._start()
                with self.load, self.watch:
                    self._strike_again(seconds)
                for tree in self.trees.values():
                    tree.stop()
                    tree.check_gone()
                self._victim.check_trail()
                self._victim.check_metrics()
            except Exception as error:  # an hour's figures are told all the same
                self.broken = f"{type(error).__name__}: {error}"
                log.exception("it cannot go on")

    def _start(self) -> None:
        self._endpoint.start()
        self._endpoint.wait_ready()
        self._victim.start()
        self._victim.wait_for_steps(1)

    def _strike_again(self, seconds: float) -> None:
        ends_s = time.monotonic() + seconds
        with Progress("soak", total=round(seconds / 60), unit="min", every_s=60.0) as progress:
            while True:
                until_s = time.monotonic() + self._rng.uniform(*QUIET_S)
                while time.monotonic() < min(until_s, ends_s):
                    self._check_runs()
                    time.sleep(1.0)
                minutes = int((seconds - (ends_s - time.monotonic())) // 60)
                progress.advance(minutes - progress.count, faults=float(len(self.strikes)))
                if time.monotonic() >= ends_s:
                    return
                self._strike(self._rng.choice(bearable_faults(self.strikes, time.monotonic())))

    def _strike(self, fault: Fault) -> None:
        log.info("%s", fault.name)
        tree, steps, struck_s = self.trees[fault.tree], self._victim.steps(), time.monotonic()
        process = tree.one(fault.title)
        if fault.kills:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        else:
            with stopped(process):
                tree.watch_for(STANDS_STILL_S)

        def recovered() -> bool:
            replaced = not fault.kills or any(one != process for one in tree.processes(fault.title))
            if fault.tree == SERVING:
                return replaced and self.load.answers_since(struck_s) >= ANSWERS
            # What is scored already is trained without anybody's help.
            return replaced and self._victim.steps() >= steps + self._victim.config.max_staleness + 2

        while not recovered():
            self._check_runs()
            if time.monotonic() > struck_s + RECOVERY_TIMEOUT_S:
                raise Violation(f"{fault.name}: not overcome after {RECOVERY_TIMEOUT_S:g} s:\n{tree.log_tail()}")
            time.sleep(0.5)
        self.strikes.append(Strike(fault, struck_s, time.monotonic()))

    def _check_runs(self) -> None:
        self._victim.check_runs()
        self._endpoint.check_runs()
        self.load.check_runs()
        self.watch.check_runs()


def soak(folder: Path, seconds: float, seed: int) -> Findings:
    """Train and serve for so long in an empty folder, and say what came of it."""
    done = Soak(make_training(folder / TRAINING), make_endpoint(folder / SERVING), seed)
    done.run(seconds)
    return findings_of(done)


def make_training(folder: Path) -> Victim:
    """A run that takes longer than anybody waits."""
    victim = make_victim(folder)
    victim.config = replace(
        victim.config,
        max_steps=0,
        epochs=float(EPOCHS),
        checkpoint_every=20,
        parity_every=10,
        engine=replace(victim.config.engine, kv_cache_gib=0.125),  # all of it is touched within minutes
        stuck_after_s=RECOVERY_TIMEOUT_S / 2,  # beside a busy endpoint, a new engine takes minutes on two cores
    )
    return victim


def make_endpoint(folder: Path) -> Endpoint:
    """A policy that writes until it may write no more, in an empty folder that is made."""
    from sif_ray.bench.serve import write_babbling_policy  # imports torch

    folder.mkdir(parents=True)
    policy = write_babbling_policy(folder / "policy")
    engine = EngineConfig(max_model_len=512, max_num_seqs=4, kv_cache_gib=0.25)
    return Endpoint(
        ServeConfig(policy=policy, depth_model="toy", port=free_port(), max_tokens=40, engine=engine), folder
    )


def growth(
    values: Sequence[float | None], least: float = 1.0, middle: Callable[[Sequence[float]], float] = statistics.median
) -> float:
    """By which share a figure grows after the warm-up: the middle of the last third over that of the first third, which
    is taken for `least` where it is less. Values that are not known do not count.

    Example: `growth([70.0, 100.0, 100.0, 100.0, 130.0, 105.0, 105.0, 105.0])` is 0.05.
    """
    first, last = _first_and_last_third(values, middle)
    return (last - first) / max(first, least)


def grown_mb(footprints: Sequence[Footprint]) -> dict[str, float]:
    """By how much the memory of every kind of process grows, the most first."""
    kinds = sorted({kind for held in footprints for kind in held.memory_mb_of})
    grown = {}
    for kind in kinds:
        held_mb = [held.memory_mb_of.get(kind, 0.0) for held in footprints]
        first, last = _first_and_last_third(held_mb, statistics.median)
        grown[kind] = round(last - first, 1)
    return dict(sorted(grown.items(), key=lambda item: -item[1]))


def _first_and_last_third(
    values: Sequence[float | None], middle: Callable[[Sequence[float]], float]
) -> tuple[float, float]:
    counted = [value for value in values[int(WARM_UP * len(values)) :] if value is not None]
    third = len(counted) // 3
    return (middle(counted[:third]), middle(counted[-third:])) if third else (0.0, 0.0)


def findings_of(done: Soak) -> Findings:
    """Goals and figures of a soak that has ended."""
    watch, load = done.watch, done.load
    windows = [(strike.struck_s, strike.recovered_s) for strike in done.strikes if strike.fault.tree == SERVING]
    unprovoked = [
        reply
        for reply in load.replies
        if reply.outcome in COME_BACK
        and not any(reply.sent_s < end and reply.ended_s > begin for begin, end in windows)
    ]
    goals = [
        Goal("promises broken", float(bool(done.broken)), 0.0, at_least=False),
        Goal("faults", float(len(done.strikes)), 1.0, at_least=True),
        Goal("replies that nobody expects", float(len(load.surprises)), 0.0, at_least=False),
        Goal("requests that nothing explains were not answered", float(len(unprovoked)), 0.0, at_least=False),
    ]
    for tree, footprints in watch.by_tree.items() if watch.times_s else ():
        gaps = sum(held.series is None or held.object_store_mb is None for held in footprints)
        goals.append(Goal(f"{tree}: gaps in the cluster's figures", gaps / len(footprints), MOST_GAPS, at_least=False))
        for name in TITLES:
            values = [getattr(held, name) for held in footprints]
            grown = growth(values, LEAST.get(name, 1.0), MIDDLE.get(name, statistics.median))
            goals.append(Goal(f"{tree}: growth of {name}", grown, MOST_GROWTH, at_least=False))
    recoveries: dict[str, list[float]] = {}
    for strike in done.strikes:
        recoveries.setdefault(strike.fault.name, []).append(strike.recovered_s - strike.struck_s)
    begun_s = watch.times_s[0] if watch.times_s else 0.0
    times_s = [time_s - begun_s for time_s in watch.times_s]
    figures = {
        "broken": done.broken,
        "replies": dict(sorted(Counter(f"{reply.kind} {reply.outcome}" for reply in load.replies).items())),
        "surprises": load.surprises[:20],
        "unprovoked": [f"{reply.kind} {reply.outcome} at {reply.sent_s - begun_s:.1f} s" for reply in unprovoked[:20]],
        # From the strike, standing still included.
        "recovery_s": {name: spread(seconds) for name, seconds in sorted(recoveries.items())},
        "times_s": times_s,
        "held": {
            tree: [{name: getattr(held, name) for name in TITLES} for held in footprints]
            for tree, footprints in watch.by_tree.items()
        },
        "memory_grown_mb": {tree: grown_mb(footprints) for tree, footprints in watch.by_tree.items()},
    }
    strikes_s = [strike.struck_s - begun_s for strike in done.strikes]
    return Findings(goals, figures, soak_svg(times_s, watch.by_tree, strikes_s) if times_s else "")
