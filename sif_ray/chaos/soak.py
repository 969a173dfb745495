"""The job `chaos soak`: training and serving under load for as long as wanted, with parts that fail at random, and
whether what they hold of the machine stays what it is."""

from __future__ import annotations

import argparse
import logging
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from sif_ray.bench.findings import Findings, Goal, spread
from sif_ray.bench.watch import Watch
from sif_ray.chaos.endpoint import Endpoint, Load
from sif_ray.chaos.footprint import Footprint
from sif_ray.chaos.process_tree import ENGINE, ProcessTree, stopped
from sif_ray.chaos.promise import promise
from sif_ray.chaos.soak_figure import soak_svg
from sif_ray.chaos.victim import DRIVER, Victim
from sif_ray.config import EngineConfig, ServeConfig
from sif_ray.observe.progress import Progress
from sif_ray.ports import free_port

log = logging.getLogger(__name__)

SAMPLE_EVERY_S = 10.0
QUIET_S = (20.0, 60.0)  # between the recovery from a fault and the next one
RECOVERY_TIMEOUT_S = 600.0
STANDS_STILL_S = 15.0
STEPS, ANSWERS = 3, 3  # after which a fault counts as overcome
WARM_UP = 0.25  # share of the time that does not count for growth
MOST_GROWTH = 0.05
EPOCHS = 500  # of a run that is stopped long before
LEAST_STORE_MB = 20.0  # growth of less is none


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sif-ray chaos soak`."""
    parser.add_argument("--minutes", metavar="N", type=float, default=60.0, help="how long (default: 60)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of what fails when (default: 0)")
    parser.add_argument("--json", metavar="OUT", type=Path, help="file for the figures; a picture is put beside it")


def run(options: argparse.Namespace) -> int:
    """Soak. Returns 1 when something grew."""
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sif_ray-chaos-") as name:
        findings = soak(Path(name), 60 * options.minutes, options.seed)
    for goal in findings.goals:
        log.log(logging.INFO if goal.ok else logging.ERROR, goal.told())
    if options.json:
        findings.write(options.json, "soak", time.monotonic() - started_s)
    return int(not all(goal.ok for goal in findings.goals))


@dataclass(frozen=True)
class Fault:
    """Something that fails in one of the two, which goes on all the same."""

    name: str
    tree: str
    strike: Callable[[ProcessTree], None]


def _killed(title: str) -> Callable[[ProcessTree], None]:
    return lambda tree: tree.one(title).kill()


def _stands_still(title: str) -> Callable[[ProcessTree], None]:
    def strike(tree: ProcessTree) -> None:
        with stopped(tree.one(title)):
            time.sleep(STANDS_STILL_S)

    return strike


TRAINING, SERVING = "training", "serving"
FAULTS = [
    Fault("engine killed", TRAINING, _killed(ENGINE)),
    Fault("rollout actor killed", TRAINING, _killed("ray::RolloutActor")),
    Fault("reward worker killed", TRAINING, _killed("ray::RewardActor")),
    Fault("learner killed", TRAINING, _killed("ray::LearnerActor")),
    Fault("engine stands still", TRAINING, _stands_still(ENGINE)),
    Fault("learner stands still", TRAINING, _stands_still("ray::LearnerActor")),
    Fault("driver stands still", TRAINING, _stands_still(DRIVER)),
    Fault("engine killed", SERVING, _killed(ENGINE)),
    Fault("engine stands still", SERVING, _stands_still(ENGINE)),
    Fault("gateway killed", SERVING, _killed("ray::ServeReplica:sif:Gateway")),
    Fault("depth worker killed", SERVING, _killed("ray::ServeReplica:sif:Depth")),
    Fault("controller of Serve killed", SERVING, _killed("ray::ServeController")),
]


@dataclass(frozen=True)
class Strike:
    """A fault that happened, in seconds since the soak began."""

    fault: Fault
    at_s: float
    recovery_s: float


class Footprints(Watch):
    """What both hold, every few seconds."""

    def __init__(self, trees: dict[str, ProcessTree]) -> None:
        super().__init__(SAMPLE_EVERY_S)
        self._trees = trees
        self.times_s: list[float] = []
        self.by_tree: dict[str, list[Footprint]] = {name: [] for name in trees}

    def sample(self) -> None:
        self.times_s.append(time.monotonic())
        for name, tree in self._trees.items():
            self.by_tree[name].append(Footprint.of(tree))


def soak(folder: Path, seconds: float, seed: int) -> Findings:
    """Train and serve for so long. Raises `Violation` when one of them does not recover, or a promise is broken."""
    victim, endpoint = make_training(folder / TRAINING), make_endpoint(folder / SERVING)
    trees: dict[str, ProcessTree] = {TRAINING: victim, SERVING: endpoint}
    try:
        endpoint.start()
        endpoint.wait_ready()
        victim.start()
        victim.wait_for_steps(STEPS)
        with Load(endpoint, clients=2, seed=seed) as load, Footprints(trees) as watch:
            strikes = _strike_again(trees, load, seconds, seed)
        steps = _stop(victim)
        _stop(endpoint)
    finally:
        for tree in trees.values():
            tree.end()
    return _findings(watch, strikes, load, steps)


def make_training(folder: Path) -> Victim:
    """A run that takes longer than anybody waits."""
    from sif_ray.chaos.scenarios import make_victim  # imports torch

    victim = make_victim(folder)
    victim.config = replace(
        victim.config,
        max_steps=0,
        epochs=float(EPOCHS),
        checkpoint_every=20,
        parity_every=10,
        engine=replace(victim.config.engine, kv_cache_gib=0.125),  # all of it is touched within minutes
        stuck_after_s=RECOVERY_TIMEOUT_S,  # beside a busy endpoint, a new engine takes minutes on two cores
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


def _strike_again(trees: dict[str, ProcessTree], load: Load, seconds: float, seed: int) -> list[Strike]:
    """Faults at random until the time is over, each overcome before the next."""
    rng = random.Random(f"sif_ray/soak/{seed}")
    began_s = time.monotonic()
    strikes: list[Strike] = []
    with Progress("soak", total=round(seconds / 60), unit="min", every_s=60.0) as progress:
        while True:
            until_s = time.monotonic() + rng.uniform(*QUIET_S)
            while time.monotonic() < until_s:
                for tree in trees.values():
                    tree.check_runs()
                passed_s = time.monotonic() - began_s
                progress.advance(int(passed_s // 60) - progress.count, faults=float(len(strikes)))
                if passed_s >= seconds:
                    return strikes
                time.sleep(1.0)
            fault = rng.choice(FAULTS)
            log.info("%s: %s", fault.tree, fault.name)
            struck_s = time.monotonic()
            fault.strike(trees[fault.tree])
            _wait_for_recovery(fault, trees, load)
            strikes.append(Strike(fault, struck_s - began_s, time.monotonic() - struck_s))


def _wait_for_recovery(fault: Fault, trees: dict[str, ProcessTree], load: Load) -> None:
    victim = trees[TRAINING]
    assert isinstance(victim, Victim)
    now_s = time.monotonic()
    steps = victim.steps()
    while not (load.answers_since(now_s) >= ANSWERS if fault.tree == SERVING else victim.steps() >= steps + STEPS):
        trees[fault.tree].check_runs()
        late = f"{fault.tree}: {fault.name}: nothing after {RECOVERY_TIMEOUT_S:g} s:\n{trees[fault.tree].log_tail()}"
        promise(time.monotonic() < now_s + RECOVERY_TIMEOUT_S, late)
        time.sleep(0.2)


def _stop(tree: ProcessTree) -> int:
    """Tell it to stop; of training, check what it trained and return its number of steps."""
    assert tree.process is not None
    tree.process.terminate()
    status = tree.wait()
    promise(status == 130, f"SIGTERM ended it with status {status}, 130 is a clean stop:\n{tree.log_tail()}")
    tree.check_gone()
    return len(tree.check_trail()) if isinstance(tree, Victim) else 0


def growth(values: Sequence[float], least: float = 0.0) -> float:
    """By which share of its median (at least `least`) a figure grows after the warm-up, by the median of the slopes
    between all pairs of values (Theil and Sen), which single outliers do not move."""
    import numpy as np
    from scipy.stats import theilslopes

    counted = np.asarray(values[int(WARM_UP * len(values)) :], dtype=np.float64)
    rise = theilslopes(counted).slope * (len(counted) - 1)
    return float(rise / max(float(np.median(counted)), least))


def _findings(watch: Footprints, strikes: Sequence[Strike], load: Load, steps: int) -> Findings:
    names = [field.name for field in fields(Footprint)]
    goals = [
        Goal(f"{tree}: growth of {name}", _growth_of(watch.by_tree[tree], name), MOST_GROWTH, at_least=False)
        for tree in watch.by_tree
        for name in names
    ]
    goals.append(Goal("replies that nobody expects", float(len(load.surprises)), 0.0, at_least=False))
    recoveries: dict[str, list[float]] = {}
    for strike in strikes:
        recoveries.setdefault(f"{strike.fault.tree}: {strike.fault.name}", []).append(strike.recovery_s)
    times_s = [time_s - watch.times_s[0] for time_s in watch.times_s]
    figures = {
        "steps": steps,
        "replies": dict(sorted(load.statuses.items())),
        "surprises": load.surprises[:20],
        "recovery_s": {name: spread(seconds) for name, seconds in sorted(recoveries.items())},
        "times_s": times_s,
        "held": {tree: [asdict(held) for held in footprints] for tree, footprints in watch.by_tree.items()},
    }
    return Findings(goals, figures, soak_svg(times_s, watch.by_tree, [strike.at_s for strike in strikes]))


def _growth_of(footprints: Sequence[Footprint], name: str) -> float:
    least = LEAST_STORE_MB if name == "object_store_mb" else 0.0
    return growth([getattr(held, name) for held in footprints], least)
