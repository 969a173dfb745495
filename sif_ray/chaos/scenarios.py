"""Faults in real processes, each with what is promised when it strikes.

Every scenario is a whole GRPO run of the real stage (Ray, vLLM, DeepSpeed) with the toy policy; what it has to keep is
checked by `Victim.check_finished`, and that no process is left behind by `Victim.check_gone`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from sif_ray.chaos.process_tree import ENGINE, GCS, RAYLET, stopped
from sif_ray.chaos.promise import promise
from sif_ray.chaos.victim import DRIVER, LEARNER, REWARD_WORKER, ROLLOUT_ACTOR, JudgeServer, Victim
from sif_ray.checkpoints import FINISHED, STATE, digest_values
from sif_ray.config import JudgeConfig, LearnerConfig
from sif_ray.observe.metrics import read_metrics

STRUCK_AT = 5  # training steps
PAUSE_S = 20.0  # shorter than anybody loses patience
OUTAGE_S = 15.0  # of a judge, longer than one attempt may take
FAILED, WRONG_REQUEST = 1, 2  # exit statuses
DISK_MIB = 1024
FILL_STORE = """
import sys, time, ray, numpy
ray.init(sys.argv[1], log_to_driver=False)
size = int(ray.cluster_resources()["object_store_memory"])
kept = [ray.put(numpy.zeros(size // 20, numpy.uint8)) for _ in range(30)]
print("full", flush=True)
time.sleep(600)
"""


@dataclass(frozen=True)
class Scenario:
    """`strike` is called when the run has done `STRUCK_AT` steps, and returns when it has ended well."""

    name: str
    promise: str
    strike: Callable[[Victim], None]
    own_disk: bool = False  # the run folder is a small disk of its own; only root can make one
    prepare: Callable[[Victim], None] | None = None  # called before the run starts


def possible(scenario: Scenario) -> bool:
    """Whether this process may try it."""
    return not scenario.own_disk or os.geteuid() == 0


def run_scenario(scenario: Scenario, folder: Path) -> float:
    """Seconds from the strike to the end of the run. Raises `Violation` when the promise is broken."""
    victim = make_victim(folder)
    with _small_disk(victim.output) if scenario.own_disk else contextlib.nullcontext():
        try:
            if scenario.prepare:
                scenario.prepare(victim)
            victim.start()
            victim.wait_for_steps(STRUCK_AT)
            struck_s = time.monotonic()
            scenario.strike(victim)
            seconds = time.monotonic() - struck_s
            victim.check_finished()
            victim.check_gone()
            return seconds
        finally:
            if victim.judge is not None:
                victim.judge.kill()
            victim.end()


def _give_judge(victim: Victim) -> None:
    """Answers are judged by a model over HTTP."""
    victim.judge = JudgeServer()
    victim.judge.start()
    patient = JudgeConfig(
        kind="llm",
        model="bench",
        base_url=victim.judge.base_url,
        timeout_s=5.0,
        max_wait_s=30.0,
        breaker_cooldown_s=1.0,
    )
    victim.config = replace(victim.config, judge=patient)


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def make_victim(folder: Path) -> Victim:
    """A run in an empty folder that is made."""
    from sif_ray.bench.answering_policy import write_answering_policy  # these import torch
    from sif_ray.bench.toy_dataset import write_dataset
    from sif_ray.bench.training_run import TrainingLoad, make_config

    load = TrainingLoad(steps=14, groups_per_step=4, group_size=4, max_tokens=48, max_num_seqs=16, max_staleness=2)
    folder.mkdir(parents=True)
    write_dataset(folder / "data", (load.steps + 2) * load.groups_per_step)
    config = make_config(folder, write_answering_policy(folder / "policy"), load)
    config = replace(config, checkpoint_every=2, parity_every=3, lease_timeout_s=40.0, stuck_after_s=90.0)
    return Victim(config, folder)


def _train_on_policy(victim: Victim) -> None:
    """A run that can be repeated, and that has been done once, undisturbed, beside the victim's folder."""
    _give_judge(victim)  # so that rewards differ and the policy learns
    victim.config = replace(
        victim.config,
        max_staleness=0,
        learner=LearnerConfig(),
    )
    undisturbed = _undisturbed(victim)
    undisturbed.output.parent.mkdir()
    try:
        undisturbed.start()
        _ends_well(undisturbed)
    finally:
        undisturbed.end()
    learned = [step["step"] for step in read_metrics(undisturbed.output / "metrics.jsonl") if step["grad_norm"]]
    promise(max(learned, default=0) > STRUCK_AT, f"it has learned in steps {learned}, so nothing is to be seen")


def _undisturbed(victim: Victim) -> Victim:
    folder = victim.output.with_name("undisturbed")
    return Victim(replace(victim.config, output=str(folder / "run")), folder)


# --- what strikes ----------------------------------------------------------------------------------------------------


def _replaced(worker: str, why: str, strike: Callable[[Victim], None]) -> Callable[[Victim], None]:
    """The run goes on, and its log says that this worker was lost, no other one, and `why`, a pattern."""

    def check(victim: Victim) -> None:
        told_before = victim.log.stat().st_size
        strike(victim)
        _goes_on(victim)
        told = victim.told_since(told_before)
        lost = re.findall(r"(\w+ \d+) is lost: (.*)", told)
        promise([name for name, _ in lost] == [worker] and bool(re.search(why, lost[0][1])), f"lost were {lost}")

    return check


def _killed(title: str) -> Callable[[Victim], None]:
    return lambda victim: victim.one(title).kill()


def _stopped(title: str) -> Callable[[Victim], None]:
    return lambda victim: victim.one(title).suspend()


def _paused(title: str) -> Callable[[Victim], None]:
    """A process that stands still for `PAUSE_S`."""

    def strike(victim: Victim) -> None:
        with stopped(victim.one(title)):
            victim.watch_for(PAUSE_S)
        _goes_on(victim)

    return strike


def _goes_on(victim: Victim) -> None:
    """It comes to its end in the life in which it began."""
    _ends_well(victim)
    promise(victim.starts() == [0], f"it began again, from {victim.starts()[1:]}")


def _starts_again(victim: Victim) -> None:
    """The next run goes on from the newest checkpoint, if something was left to do."""
    newest, had_finished = victim.newest_checkpoint().name, (victim.output / FINISHED).is_file()
    victim.start()
    _ends_well(victim)
    start = victim.starts()[-1]
    promise(had_finished or f"step-{start:06d}" == newest, f"it went on from {start}, not from {newest}")


def _ends_well(victim: Victim) -> None:
    status = victim.wait()
    promise(status == 0, f"it ended with status {status}:\n{victim.log_tail()}")


def _fails(why: str, strike: Callable[[Victim], None]) -> Callable[[Victim], None]:
    """Without this nothing goes on here: an error that says `why`, and the next run goes on."""

    def check(victim: Victim) -> None:
        told_before = victim.log.stat().st_size
        strike(victim)
        _ends_with_an_error(victim, why, told_before)
        _starts_again(victim)

    return check


def _ends_with_an_error(victim: Victim, why: str, told_before: int) -> None:
    status = victim.wait()
    promise(status == FAILED, f"it ended with status {status}:\n{victim.log_tail()}")
    promise(why in victim.told_since(told_before), f"nothing is said of {why!r}:\n{victim.log_tail()}")


def _driver_killed(victim: Victim) -> None:
    assert victim.process is not None
    victim.process.kill()
    victim.wait()
    _starts_again(victim)


def _ended_on_policy(victim: Victim) -> None:
    """Told to stop, started again, and killed."""
    steps = victim.steps()
    victim.stop()
    victim.start()
    victim.wait_for_steps(steps + 3)
    _driver_killed(victim)
    promise(victim.policy.read_bytes() == _undisturbed(victim).policy.read_bytes(), "the weights are others")


def _told_to_stop(victim: Victim) -> None:
    victim.stop()
    _has_saved_its_last_step(victim)
    _starts_again(victim)


def _has_saved_its_last_step(victim: Victim) -> None:
    trained, newest = list(victim.check_trail())[-1], victim.newest_checkpoint().name
    promise(f"step-{trained:06d}" == newest, f"it has trained version {trained} and saved {newest}")


def _learner_killed(victim: Victim) -> None:
    newest = victim.newest_checkpoint()
    victim.one(LEARNER).kill()
    _ends_well(victim)
    again = victim.starts()[1:]
    # A newer one may have been written between the look and the kill.
    promise(len(again) == 1 and f"step-{again[0]:06d}" >= newest.name, f"it began again from {again}, not {newest}")


def _judge_killed(victim: Victim) -> None:
    assert victim.judge is not None
    victim.judge.kill()
    victim.watch_for(OUTAGE_S)
    victim.judge.start()
    _goes_on(victim)


def _judge_paused(victim: Victim) -> None:
    assert victim.judge is not None
    with stopped(victim.judge.process):
        victim.watch_for(OUTAGE_S)
    _goes_on(victim)


def _judge_gone(victim: Victim) -> None:
    """Longer than anybody waits: the step ends and is saved, and no prompt pays for it."""
    assert victim.judge is not None
    told_before = victim.log.stat().st_size
    victim.judge.kill()
    _ends_with_an_error(victim, "answered nothing for judge.max_wait_s", told_before)
    _has_saved_its_last_step(victim)
    victim.judge.start()
    _starts_again(victim)


def _no_memory(title: str) -> Callable[[Victim], None]:
    """The process gets no more memory than it has."""

    def strike(victim: Victim) -> None:
        process = victim.one(title)
        room = process.memory_info().vms + 2**20
        process.rlimit(psutil.RLIMIT_AS, (room, room))

    return strike


def _full_store(victim: Victim) -> None:
    """Somebody else fills the object store until the run has ended."""
    raylet = victim.one(RAYLET)
    (address,) = (word.removeprefix("--gcs-address=") for word in raylet.cmdline() if word.startswith("--gcs-address="))
    allowed = {name: value for name, value in raylet.environ().items() if name.startswith("RAY_AUTH_")}
    command = [sys.executable, "-c", FILL_STORE, address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | allowed) as filler:
        try:
            assert filler.stdout is not None
            assert filler.stdout.readline() == "full\n"
            _goes_on(victim)
        finally:
            filler.kill()


# --- what the disk does ----------------------------------------------------------------------------------------------


def _cut(name: str) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        file = _biggest(checkpoint, name)
        os.truncate(file, file.stat().st_size // 2)

    return damage


def _flip(name: str) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        file = _biggest(checkpoint, name)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)

    return damage


def _other_format(checkpoint: Path) -> None:
    state = json.loads((checkpoint / STATE).read_text())
    del state["digest"]
    state["format"] = 99
    (checkpoint / STATE).write_text(json.dumps(state | {"digest": digest_values(state)}))


def _biggest(checkpoint: Path, name: str) -> Path:
    return max(checkpoint.rglob(name), key=lambda path: path.stat().st_size)


DAMAGES = {  # of a checkpoint, with what the error says of it
    "its weights end early": (_cut("*.pt"), "bytes of"),
    "a byte of its weights is another": (_flip("*.pt"), "its bytes are not those that were written"),
    "a byte of its groups is another": (_flip("groups.parquet"), "its bytes are not those that were written"),
    "a byte of its state is another": (_flip(STATE), "damaged"),
    "it has another format": (_other_format, "format 99"),
}


def _checkpoint_damaged(victim: Victim) -> None:
    """After a kill, the newest checkpoint is refused by its name, however it is damaged; the one before goes on."""
    assert victim.process is not None
    victim.process.kill()
    victim.wait()
    newest, intact = victim.newest_checkpoint(), victim.output.with_name("intact")
    shutil.copytree(newest, intact)
    for what, (damage, why) in DAMAGES.items():
        damage(newest)
        told_before = victim.log.stat().st_size
        victim.start()
        status, told = victim.wait(), victim.told_since(told_before)
        refused = status in (FAILED, WRONG_REQUEST) and newest.name in told and why in told
        promise(refused, f"{what}: it ended with status {status}:\n{told}")
        shutil.rmtree(newest)
        shutil.copytree(intact, newest)
    shutil.rmtree(newest)
    _starts_again(victim)


def _half_written(victim: Victim) -> None:
    """What a kill in the middle of a checkpoint leaves is ignored."""
    assert victim.process is not None
    victim.process.kill()
    victim.wait()
    newest = victim.newest_checkpoint()
    newest.rename(newest.with_name(f".{newest.name}.part"))
    _starts_again(victim)


def _no_space(victim: Victim) -> None:
    """The run folder's disk is full: an error, and the next run goes on when there is room."""
    filler, told_before = victim.output / "filler", victim.log.stat().st_size
    with filler.open("wb", buffering=0) as file:
        try:
            while True:  # the run writes, too: what was free a moment ago says nothing
                file.write(bytes(2**20))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    _ends_with_an_error(victim, "No space left", told_before)
    filler.unlink()
    _starts_again(victim)


def _read_only(victim: Victim) -> None:
    """The disk of the checkpoints turns read-only, for whatever is not open yet."""
    folder, told_before = str(victim.output / "checkpoints"), victim.log.stat().st_size
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        _ends_with_an_error(victim, "Read-only file system", told_before)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
    _starts_again(victim)


DIED, SILENT = "died", "answered no"  # none of its requests, or nothing
NO_MEMORY = f"{DIED}|Cannot allocate memory"  # which an update may be the first to meet

SCENARIOS = [
    Scenario("driver-killed", "the next run goes on from the newest checkpoint", _driver_killed),
    Scenario(
        "driver-ended-on-policy",
        "stopped, then killed: with max_staleness 0 the last run ends with the weights of one left alone",
        _ended_on_policy,
        prepare=_train_on_policy,
    ),
    Scenario("driver-told-to-stop", "the step ends and is saved; the next run goes on", _told_to_stop),
    Scenario("driver-paused", "goes on", _paused(DRIVER)),
    Scenario("rollout-actor-killed", "replaced at once", _replaced("engine 0", DIED, _killed(ROLLOUT_ACTOR))),
    Scenario("rollout-actor-stopped", "replaced", _replaced("engine 0", SILENT, _stopped(ROLLOUT_ACTOR))),
    Scenario("engine-killed", "replaced at once", _replaced("engine 0", DIED, _killed(ENGINE))),
    Scenario(
        "engine-stopped", "replaced when its leases have expired", _replaced("engine 0", SILENT, _stopped(ENGINE))
    ),
    Scenario("engine-out-of-memory", "replaced", _replaced("engine 0", NO_MEMORY, _no_memory(ENGINE))),
    Scenario("learner-killed", "all starts again from the newest checkpoint, by itself", _learner_killed),
    Scenario("learner-stopped", "an error that says so; the next run goes on", _fails("is stuck", _stopped(LEARNER))),
    Scenario("learner-paused", "waited for", _paused(LEARNER)),
    Scenario(
        "learner-out-of-memory",
        "an error that says so; the next run goes on",
        _fails("allocate memory", _no_memory(LEARNER)),
    ),
    Scenario("reward-worker-killed", "replaced at once", _replaced("reward 0", DIED, _killed(REWARD_WORKER))),
    Scenario("reward-worker-stopped", "replaced", _replaced("reward 0", SILENT, _stopped(REWARD_WORKER))),
    Scenario(
        "raylet-killed",
        "an error when nothing can start again; the next run goes on",
        _fails("is stuck", _killed(RAYLET)),
    ),
    Scenario("raylet-paused", "waited for", _paused(RAYLET)),
    Scenario("gcs-killed", "an error that says so; the next run goes on", _fails("connect to GCS", _killed(GCS))),
    Scenario("gcs-paused", "waited for", _paused(GCS)),
    Scenario("judge-killed", "waited for; no prompt is dropped", _judge_killed, prepare=_give_judge),
    Scenario("judge-paused", "waited for; no prompt is dropped", _judge_paused, prepare=_give_judge),
    Scenario(
        "judge-gone",
        "the step ends and is saved, then an error that says so; the next run goes on, no prompt is dropped",
        _judge_gone,
        prepare=_give_judge,
    ),
    Scenario("object-store-full", "Ray spills to disk, and the run goes on", _full_store),
    Scenario("checkpoint-damaged", "refused by name, in any way; the one before goes on", _checkpoint_damaged),
    Scenario("checkpoint-half-written", "ignored; the one before goes on", _half_written),
    Scenario("disk-full", "an error that says so; with room again the next run goes on", _no_space, own_disk=True),
    Scenario("disk-read-only", "an error that says so; the next run goes on", _read_only, own_disk=True),
]
