"""Faults in real processes, each with what is promised when it strikes.

Every scenario is a whole GRPO run of the real stage (Ray, vLLM, DeepSpeed) with the toy policy; what it has to keep is
checked by `Victim.check_finished`, and that no process is left behind by `Victim.check_gone`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from sif_ray.chaos.process_tree import ENGINE, stopped
from sif_ray.chaos.promise import promise
from sif_ray.chaos.victim import DRIVER, JudgeServer, Victim
from sif_ray.config import JudgeConfig

STRUCK_AT = 5  # training steps
WRONG_REQUEST = 2  # exit status
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
    judged: bool = False  # by a model over HTTP


def possible(scenario: Scenario) -> bool:
    """Whether this process may try it."""
    return not scenario.own_disk or os.geteuid() == 0


def run_scenario(scenario: Scenario, folder: Path) -> float:
    """Seconds from the strike to the end of the run. Raises `Violation` when the promise is broken."""
    victim = make_victim(folder)
    with _small_disk(victim.output) if scenario.own_disk else contextlib.nullcontext():
        try:
            if scenario.judged:
                _give_judge(victim)
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
    victim.judge = JudgeServer()
    victim.judge.start()
    patient = JudgeConfig(
        kind="llm",
        model="bench",
        base_url=victim.judge.base_url,
        timeout_s=10.0,
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


# --- what strikes ----------------------------------------------------------------------------------------------------


def _killed(title: str) -> Callable[[Victim], None]:
    """A process that is replaced while the run goes on."""

    def strike(victim: Victim) -> None:
        victim.one(title).kill()
        _goes_on(victim)

    return strike


def _stopped_for(title: str, seconds: float) -> Callable[[Victim], None]:
    """A process that stands still for a while, shorter than anybody loses patience."""

    def strike(victim: Victim) -> None:
        with stopped(victim.one(title)):
            time.sleep(seconds)
        _goes_on(victim)

    return strike


def _stopped_for_good(title: str) -> Callable[[Victim], None]:
    def strike(victim: Victim) -> None:
        victim.one(title).send_signal(signal.SIGSTOP)
        _goes_on(victim)

    return strike


def _goes_on(victim: Victim) -> None:
    status = victim.wait()
    promise(status == 0, f"it ended with status {status}:\n{victim.log_tail()}")


def _starts_again(victim: Victim) -> None:
    victim.start()
    _goes_on(victim)


def _ends_the_run(title: str) -> Callable[[Victim], None]:
    """A process without which nothing goes on here: an error, and the next run goes on."""

    def strike(victim: Victim) -> None:
        victim.one(title).kill()
        status = victim.wait()
        promise(status != 0, f"without {title} it ended with status 0")
        _starts_again(victim)

    return strike


def _driver_killed(victim: Victim) -> None:
    assert victim.process is not None
    victim.process.kill()
    victim.wait()
    _starts_again(victim)


def _told_to_stop(victim: Victim) -> None:
    victim.stop()
    _starts_again(victim)


def _judge_killed(victim: Victim) -> None:
    assert victim.judge is not None
    victim.judge.kill()
    time.sleep(15.0)
    victim.judge.start()
    _goes_on(victim)
    finished = json.loads((victim.output / "finished.json").read_text())
    promise(not finished["dropped"], f"an outage of 15 s cost prompts: {finished['dropped']}")


def _no_memory(title: str, struck: Callable[[Victim], None]) -> Callable[[Victim], None]:
    """The process gets no more memory than it has."""

    def strike(victim: Victim) -> None:
        process = victim.one(title)
        room = process.memory_info().vms + 2**20
        process.rlimit(psutil.RLIMIT_AS, (room, room))
        struck(victim)

    return strike


def _fails_and_starts_again(victim: Victim) -> None:
    status = victim.wait()
    promise(status == 1, f"it ended with status {status}:\n{victim.log_tail()}")
    promise("memory" in victim.log.read_text(errors="replace"), f"memory is not named:\n{victim.log_tail()}")
    _starts_again(victim)


def _full_store(victim: Victim) -> None:
    """Somebody else fills the object store until the run has ended."""
    raylet = victim.one("raylet/raylet")
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


def _newest(victim: Victim) -> Path:
    return max((victim.output / "checkpoints").glob("step-*"))


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
    state = checkpoint / "state.json"
    state.write_text(state.read_text().replace('"format": 1', '"format": 99'))


def _biggest(checkpoint: Path, name: str) -> Path:
    return max(checkpoint.rglob(name), key=lambda path: path.stat().st_size)


DAMAGES = {
    "its weights end early": _cut("*.pt"),
    "a byte of its groups is another": _flip("groups.parquet"),
    "a byte of its state is another": _flip("state.json"),
    "it has another format": _other_format,
}


def _checkpoint_damaged(victim: Victim) -> None:
    """After a kill, the newest checkpoint is refused by its name, however it is damaged; the one before goes on."""
    assert victim.process is not None
    victim.process.kill()
    victim.wait()
    newest, intact = _newest(victim), victim.output.with_name("intact")
    shutil.copytree(newest, intact)
    for what, damage in DAMAGES.items():
        damage(newest)
        told = victim.log.stat().st_size
        victim.start()
        status = victim.wait()
        text = victim.log.read_bytes()[told:].decode(errors="replace")
        promise(status == WRONG_REQUEST and newest.name in text, f"{what}: it ended with status {status}:\n{text}")
        shutil.rmtree(newest)
        shutil.copytree(intact, newest)
    shutil.rmtree(newest)
    _starts_again(victim)


def _half_written(victim: Victim) -> None:
    """What a kill in the middle of a checkpoint leaves is ignored."""
    assert victim.process is not None
    victim.process.kill()
    victim.wait()
    newest = _newest(victim)
    newest.rename(newest.with_name(f".{newest.name}.part"))
    _starts_again(victim)


def _no_space(victim: Victim) -> None:
    """The run folder's disk is full: an error, and the next run goes on when there is room."""
    filler = victim.output / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:  # the run writes, too: what was free a moment ago says nothing
                file.write(bytes(2**20))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    status = victim.wait()
    promise(status != 0, f"with a full disk it ended with status {status}")
    promise("No space left" in victim.log.read_text(errors="replace"), f"not named:\n{victim.log_tail()}")
    filler.unlink()
    _starts_again(victim)


def _read_only(victim: Victim) -> None:
    """The disk of the checkpoints turns read-only, for whatever is not open yet."""
    folder = str(victim.output / "checkpoints")
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        status = victim.wait()
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
    promise(status != 0, "with a read-only disk it ended with status 0")
    promise("Read-only file system" in victim.log.read_text(errors="replace"), f"not named:\n{victim.log_tail()}")
    _starts_again(victim)


SCENARIOS = [
    Scenario("driver-killed", "the next run goes on from the newest checkpoint", _driver_killed),
    Scenario("driver-told-to-stop", "the step ends and is saved; the next run goes on", _told_to_stop),
    Scenario("driver-stopped", "a driver that stands still for 20 s goes on", _stopped_for(DRIVER, 20.0)),
    Scenario("rollout-actor-killed", "replaced; its leases return at once", _killed("ray::RolloutActor")),
    Scenario("engine-killed", "replaced; its leases return at once", _killed(ENGINE)),
    Scenario("engine-stopped", "replaced when its leases have expired", _stopped_for_good(ENGINE)),
    Scenario("learner-killed", "everything starts again from the newest checkpoint", _killed("ray::LearnerActor")),
    Scenario("learner-stopped", "waited for", _stopped_for("ray::LearnerActor", 20.0)),
    Scenario("reward-worker-killed", "replaced; its groups are scored by its successor", _killed("ray::RewardActor")),
    Scenario("raylet-killed", "the run ends with an error, the next one goes on", _ends_the_run("raylet/raylet")),
    Scenario("gcs-killed", "the run ends with an error, the next one goes on", _ends_the_run("gcs/gcs_server")),
    Scenario(
        "judge-killed",
        "waited for; no prompt is dropped and none trains on a made-up reward",
        _judge_killed,
        judged=True,
    ),
    Scenario("object-store-full", "Ray spills to disk, and the run goes on", _full_store),
    Scenario(
        "learner-out-of-memory",
        "the run ends with an error that says so, the next one goes on",
        _no_memory("ray::LearnerActor", _fails_and_starts_again),
    ),
    Scenario("engine-out-of-memory", "replaced", _no_memory(ENGINE, _goes_on)),
    Scenario("checkpoint-damaged", "refused by name, in any way; the one before goes on", _checkpoint_damaged),
    Scenario("checkpoint-half-written", "ignored; the one before goes on", _half_written),
    Scenario("disk-full", "an error that says so; with room again the next run goes on", _no_space, own_disk=True),
    Scenario("disk-read-only", "an error that says so; the next run goes on", _read_only, own_disk=True),
]
