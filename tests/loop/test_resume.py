"""A run that is killed, stopped or loses its learner goes on: every ticket ends once, no token is older than the bound.

What was trained is read from the trail, which the loop writes beside the ledger.
"""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from loop_fakes import FakeEngine, FakeFactory, FakeScorer
from loop_life import EPOCHS, MAX_STALENESS, PROMPTS, DiskLearner, live, parts_of

from sif_ray.bench.toy_dataset import write_dataset
from sif_ray.learner.actor import LearnerDied
from sif_ray.loop import stage
from sif_ray.loop.grpo import LoopError
from sif_ray.observe.metrics import read_metrics
from sif_ray.observe.trail import read_trail
from sif_ray.runtime import saving_time_s

TICKETS = PROMPTS * EPOCHS
SHORT, SHORT_TICKETS = {"max_steps": 14}, 42


def check_finished(output: Path, num_tickets: int = TICKETS, max_staleness: int = MAX_STALENESS) -> Counter[str]:
    """Every ticket was trained once or dropped with a counted reason; returns the reasons."""
    steps = read_trail(output / "trained.jsonl")
    finished = json.loads((output / "finished.json").read_text())
    assert list(steps) == list(range(1, finished["version"] + 1))
    trained = Counter(ticket_id for tickets in steps.values() for ticket_id in tickets)
    assert set(trained.values()) == {1}
    assert not trained.keys() & finished["dropped"].keys()
    assert len(trained) + len(finished["dropped"]) == num_tickets
    assert finished["counts"]["trained"] == len(trained)
    staleness = [version - 1 - oldest for version, tickets in steps.items() for oldest in tickets.values()]
    assert min(staleness) >= 0 and max(staleness) <= max_staleness
    weights = output / "checkpoint" / "weights.json"
    assert not weights.exists() or json.loads(weights.read_text()) == list(trained), "the fake learner's own memory"
    return Counter(finished["dropped"].values())


def test_learner_that_never_writes_the_policy_ends_the_run_and_the_next_one_writes_it(tmp_path):
    class Hangs(DiskLearner):
        async def save_policy(self, output):
            await asyncio.Event().wait()

    limits = SHORT | {"stuck_after_s": 1.0, "lease_timeout_s": 0.5}
    with pytest.raises(LoopError, match=r"the learner is stuck: it has not written the policy to .*checkpoint within"):
        asyncio.run(stage.train(parts_of(tmp_path, make_learner=Hangs, **limits)))
    assert not (tmp_path / "finished.json").exists()
    asyncio.run(stage.train(parts_of(tmp_path, **SHORT)))
    check_finished(tmp_path, SHORT_TICKETS)


def test_run_without_interruption(tmp_path):
    live(tmp_path, seed=0)
    assert check_finished(tmp_path)["judge abstained: no reference"] == EPOCHS
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-000048", "step-000049"]


def test_run_killed_at_random_moments_trains_every_prompt_once(tmp_path):
    rng = random.Random(7)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sif_ray.loop.stage"])  # its imports take seconds
    reached = []
    for kill in range(20):
        before = last_start(tmp_path)
        driver = context.Process(target=live, args=(tmp_path, kill))
        driver.start()
        wait_for_steps(tmp_path, before, rng.randint(0, 3), driver.is_alive)
        driver.join(timeout=rng.uniform(0, 0.05))
        assert driver.exitcode is None, f"the run ended before kill {kill}, at versions {reached}"
        driver.kill()
        driver.join()
        reached.append(newest_version(tmp_path))
    assert sorted(reached) != reached, "no kill undid a step: the test shows nothing"
    live(tmp_path, seed=99)
    assert check_finished(tmp_path)["judge abstained: no reference"] == EPOCHS


def newest_version(output: Path) -> int:
    trail = output / "trained.jsonl"
    return max(read_trail(trail), default=0) if trail.exists() else 0


def last_start(output: Path) -> str:
    """What the newest life of the run has written when it started."""
    trail = output / "trained.jsonl"
    lines = trail.read_text().splitlines() if trail.exists() else []
    return next((line for line in reversed(lines) if "continue_from" in line), "")


def wait_for_steps(output: Path, before: str, count: int, is_alive: Callable[[], bool]) -> None:
    """Until a life that started after `before` has done `count` steps, or is not alive any more."""
    while last_start(output) == before and is_alive():
        time.sleep(0.005)
    wanted = newest_version(output) + count
    while newest_version(output) < wanted and is_alive():
        time.sleep(0.005)


# --- stopped ---------------------------------------------------------------------------------------------------------


async def run_and_stop(parts: stage.Parts, when: Callable[[], bool]) -> None:
    """Cancel the run, as SIGTERM and Ctrl-C do, as soon as `when` holds."""
    run = asyncio.create_task(stage.train(parts))
    while not when():
        await asyncio.sleep(0.002)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("max_staleness", [0, MAX_STALENESS])
def test_stopped_run_saves_its_last_step_and_goes_on(tmp_path, max_staleness):
    changes = {"checkpoint_every": 0, "max_staleness": max_staleness} | SHORT
    for stop_at in (4, 9, 10):
        parts = parts_of(tmp_path, **changes)
        asyncio.run(run_and_stop(parts, lambda stop_at=stop_at: newest_version(tmp_path) >= stop_at))
        assert parts.checkpoints.newest_version() == newest_version(tmp_path) >= stop_at
    asyncio.run(stage.train(parts_of(tmp_path, **changes)))
    check_finished(tmp_path, SHORT_TICKETS, max_staleness)
    assert (tmp_path / "trained.jsonl").read_text().count("continue_from") == 4
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == len(read_trail(tmp_path / "trained.jsonl"))


def test_stop_that_takes_too_long_is_given_up(tmp_path, monkeypatch):
    stuck_at = []

    class Stuck(DiskLearner):
        async def train(self, groups, version):
            if version == 5:
                stuck_at.append(version)
                await asyncio.Event().wait()
            return await super().train(groups, version)

    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "0.1")
    asyncio.run(run_and_stop(parts_of(tmp_path, make_learner=Stuck, **SHORT), lambda: bool(stuck_at)))
    again = parts_of(tmp_path, **SHORT)
    assert again.checkpoints.newest_version() == 4
    asyncio.run(stage.train(again))
    check_finished(tmp_path, SHORT_TICKETS)


def test_error_while_stopping_is_told(tmp_path, caplog):
    class Full(DiskLearner):
        async def save_checkpoint(self, folder, client_state):
            raise OSError("no space left on device")

    parts = parts_of(tmp_path, make_learner=Full, checkpoint_every=0)
    asyncio.run(run_and_stop(parts, lambda: newest_version(tmp_path) >= 3))
    assert "the step was not saved: OSError('no space left on device')" in caplog.text


def test_stop_before_the_learner_is_up_waits_for_nothing(tmp_path):
    starting = []

    class Starting(DiskLearner):
        async def start(self, total_steps):
            starting.append(total_steps)
            await asyncio.Event().wait()

    parts = parts_of(tmp_path, make_learner=Starting)
    started_s = time.monotonic()
    asyncio.run(run_and_stop(parts, lambda: bool(starting)))
    assert time.monotonic() - started_s < saving_time_s() / 2


# --- a learner rank dies ---------------------------------------------------------------------------------------------


def learners_that_die(at: list[tuple[str, int]]) -> tuple[type[DiskLearner], list[DiskLearner]]:
    """A learner class whose n-th instance dies in the n-th (method, version); instances beyond live."""
    made: list[DiskLearner] = []

    class Mortal(DiskLearner):
        def __init__(self, rng, slow_s):
            super().__init__(rng, slow_s)
            self.dies = at[len(made)] if len(made) < len(at) else ("", -1)
            made.append(self)

        def fate(self, method: str) -> None:
            if self.dies == (method, self.version):
                raise LearnerDied(f"rank 1 of 2 died in {method}")

        async def start(self, total_steps):
            await super().start(total_steps)
            self.fate("start")

        async def train(self, groups, version):
            self.fate("train")
            return await super().train(groups, version)

        async def publish(self, version):
            self.fate("publish")
            return await super().publish(version)

        async def save_checkpoint(self, folder, client_state):
            await super().save_checkpoint(folder, client_state)
            self.fate("save_checkpoint")

        async def save_policy(self, output):
            self.fate("save_policy")
            await super().save_policy(output)

    return Mortal, made


@pytest.mark.parametrize(
    ("deaths", "starts"),
    [
        ([("train", 1), ("train", 5)], [0, 0, 4]),  # before the first checkpoint, and after one
        ([("publish", 4), ("save_checkpoint", 6)], [0, 2, 4]),  # the checkpoint of version 6 is not complete
        ([("start", 0), ("save_policy", 14)], [0, 0, 14]),
    ],
)
def test_run_whose_learner_dies_starts_again_from_the_checkpoint(tmp_path, caplog, deaths, starts):
    learner, made = learners_that_die(deaths)
    with caplog.at_level(logging.WARNING):
        asyncio.run(stage.train(parts_of(tmp_path, make_learner=learner, **SHORT)))
    check_finished(tmp_path, SHORT_TICKETS)
    lines = [json.loads(line) for line in (tmp_path / "trained.jsonl").read_text().splitlines()]
    assert [line["continue_from"] for line in lines if "continue_from" in line] == starts
    assert len(made) == 3 and all(learner.ended for learner in made)
    told = [record.getMessage() for record in caplog.records if record.name == "sif_ray.loop.stage"]
    assert [line.split(":")[0] for line in told] == [
        f"the run starts again from step {start} (death 1 of a learner there)" for start in starts[1:]
    ]


def test_on_policy_run_that_starts_again_draws_what_it_would_have_drawn(tmp_path):
    def drawn(output: Path, deaths: list[tuple[str, int]]) -> tuple[dict, set]:
        learner, _ = learners_that_die(deaths)
        changes = {"max_staleness": 0, "checkpoint_every": 1, "make_scorer": FakeScorer} | SHORT
        parts = parts_of(output, make_learner=learner, **changes)
        asyncio.run(stage.train(parts))
        check_finished(output, SHORT_TICKETS, max_staleness=0)
        seeds = {(r.ticket_id, r.seed) for _, engine in parts.engines.started for r in engine.requests}
        steps = {version: set(tickets) for version, tickets in read_trail(output / "trained.jsonl").items()}
        return steps, {(ticket_id, seed) for ticket_id, seed in seeds if not ticket_id.startswith("probe")}

    assert drawn(tmp_path / "calm", []) == drawn(tmp_path / "died", [("train", 5), ("publish", 9)])


def test_policy_that_was_lost_is_written_again(tmp_path):
    asyncio.run(stage.train(parts_of(tmp_path, **SHORT)))
    shutil.rmtree(tmp_path / "checkpoint")
    asyncio.run(stage.train(parts_of(tmp_path, **SHORT)))
    check_finished(tmp_path, SHORT_TICKETS)
    assert (tmp_path / "checkpoint" / "weights.json").is_file()


def test_death_that_an_engine_notices_first_is_the_learners(tmp_path, caplog):
    class Vanishing(DiskLearner):
        gone = False

        async def publish(self, version):
            update = await super().publish(version)
            if version != 7 or Vanishing.gone:
                return update
            Vanishing.gone = self.is_gone = True
            return replace(update, buckets=())  # what the learner held is not there any more

        async def check_alive(self):
            if getattr(self, "is_gone", False):
                raise LearnerDied("rank 0 of 1 died")

    class Fetching(FakeEngine):
        async def update_weights(self, update):
            if not update.buckets:
                raise ConnectionError("the owner of the weights is gone")
            return await super().update_weights(update)

    rng = random.Random(0)
    parts = parts_of(tmp_path, make_learner=Vanishing, **SHORT)
    engines = FakeFactory([], lambda: Fetching(rng), rng, slow_s=0.01)
    with caplog.at_level(logging.WARNING):
        asyncio.run(stage.train(replace(parts, engines=engines)))
    check_finished(tmp_path, SHORT_TICKETS)
    assert "the run starts again from step 6 (death 1 of a learner there): rank 0 of 1 died" in caplog.text


def test_error_of_another_part_ends_the_run(tmp_path):
    class Broken(FakeScorer):
        async def score(self, texts_G, sample, previous):
            raise ConnectionError("no judge")

    with pytest.raises(ConnectionError, match="no judge"):
        asyncio.run(stage.train(parts_of(tmp_path, make_scorer=Broken)))


def test_learner_that_dies_again_and_again_ends_the_run(tmp_path):
    learner, made = learners_that_die([("train", 0)] * 10)
    with pytest.raises(LearnerDied):
        asyncio.run(stage.train(parts_of(tmp_path, make_learner=learner)))
    assert len(made) == 1 + stage.MAX_LEARNER_DEATHS


def test_learners_that_die_after_a_new_checkpoint_do_not_end_the_run(tmp_path):
    learner, made = learners_that_die([("train", version) for version in range(1, 14, 2)])
    asyncio.run(stage.train(parts_of(tmp_path, make_learner=learner, **SHORT)))
    check_finished(tmp_path, SHORT_TICKETS)
    assert len(made) == 8 > 1 + stage.MAX_LEARNER_DEATHS


# --- real parts ------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
REAL_PROMPTS, REAL_EPOCHS, REAL_STALENESS = 100, 3, 2
SETTINGS = (
    *("split=grpo", "policy=toy", "groups_per_step=3", "group_size=4"),
    *(f"epochs={REAL_EPOCHS}", f"max_staleness={REAL_STALENESS}"),
    *("checkpoint_every=4", "parity_every=1000", "trackers=[]", "sampling.max_tokens=16"),
    *("eval_every=40", "eval_split=grpo", "eval_samples=4"),
    *("engine.max_model_len=512", "engine.max_num_seqs=8", "engine.kv_cache_gib=0.25"),
)
GONE_WITHIN_S = 60.0
RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # of a dead head node: they wait a minute for it to return


@pytest.fixture(scope="module")
def toy_data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("resume") / "data", REAL_PROMPTS)


def start_job(data: Path, output: Path) -> subprocess.Popen:
    output.mkdir(exist_ok=True)
    command = [sys.executable, "-u", "jobs/grpo.py", f"data={data}", f"output={output}", *SETTINGS]
    with (output / "log").open("a") as told:
        return subprocess.Popen(command, cwd=ROOT, stdout=told, stderr=subprocess.STDOUT)


def descendants(job: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(job.pid).children(recursive=True)


def check_gone(processes: list[psutil.Process], within_s: float = GONE_WITHIN_S) -> None:
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    left = [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not left, f"still there after {within_s:g} s: {left}"


def kill_and_resume(data: Path, output: Path, kills: int, rng: random.Random) -> list[int]:
    """Kill that many lives of a run; returns the version that each had reached."""
    reached, agents = [], []
    for _ in range(kills):
        before = last_start(output)
        job = start_job(data, output)
        wait_for_steps(output, before, rng.randint(0, 3), lambda job=job: job.poll() is None)
        time.sleep(rng.uniform(0, 1))
        assert job.poll() is None, f"the run ended at {reached}: {(output / 'log').read_text()}"
        started = descendants(job)
        agents += [process for process in started if process.name() in RAY_AGENTS]
        job.kill()
        job.wait()
        check_gone([process for process in started if process not in agents])
        reached.append(newest_version(output))
    check_gone(agents, within_s=2 * GONE_WITHIN_S)
    return reached


@pytest.mark.slow
@pytest.mark.timeout(3600)  # a start takes half a minute on two idle cores
def test_real_run_killed_again_and_again_trains_every_prompt_once(toy_data, tmp_path):
    reached = kill_and_resume(toy_data, tmp_path, int(os.environ.get("SIF_RAY_KILLS", "20")), random.Random(11))
    job = start_job(toy_data, tmp_path)
    assert job.wait() == 0, (tmp_path / "log").read_text()
    check_finished(tmp_path, REAL_PROMPTS * REAL_EPOCHS, REAL_STALENESS)
    assert len(set(reached)) > 1, f"too little was done between the kills: {reached}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_run_that_gets_sigterm_saves_its_step_and_goes_on(toy_data, tmp_path):
    job = start_job(toy_data, tmp_path)
    wait_for_steps(tmp_path, "", 3, lambda: job.poll() is None)
    started = descendants(job)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=120) == 130, (tmp_path / "log").read_text()
    check_gone(started)
    version = newest_version(tmp_path)
    assert version >= 3 and (tmp_path / "checkpoints" / f"step-{version:06d}" / "state.json").is_file()

    assert start_job(toy_data, tmp_path).wait() == 0, (tmp_path / "log").read_text()
    check_finished(tmp_path, REAL_PROMPTS * REAL_EPOCHS, REAL_STALENESS)
    log = (tmp_path / "log").read_text()
    assert f"continuing from step {version} of 100" in log
    steps = read_metrics(tmp_path / "metrics.jsonl")
    assert steps[-1]["step"] == 100
    evaluated = [step["eval/version"] for step in steps if "eval/version" in step]
    assert evaluated[-1] == 100 and {40, 80} <= set(evaluated)

    assert start_job(toy_data, tmp_path).wait() == 0
    assert "finished before, after 100 steps; resume=false runs it again" in (tmp_path / "log").read_text()
