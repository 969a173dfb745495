"""The simulator: it finds bugs that are planted, says the same twice, and finds none in what there is."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from mutations import MUTATIONS, Mutation

import sif_ray
from sif_ray.chaos.causes import explains_drop, explains_failure
from sif_ray.chaos.faults import Faults, Rates, unsafe_files
from sif_ray.chaos.simulate import simulate_all, summary
from sif_ray.chaos.simulation import draw_config
from sif_ray.chaos.virtual_loop import Crash, Deadlock, VirtualLoop
from sif_ray.config import validate
from sif_ray.loop.grpo import NO_SPREAD, LoopError
from sif_ray.loop.pool import PoolError

SEEDS = 160
MUTANT_SEEDS = 1500
PACKAGE = Path(sif_ray.__file__).parent


def virtual(seed: int = 0, **options) -> VirtualLoop:
    settings = {"shuffle": True, "thread_s": 1.0, "after_event": lambda: None}
    return VirtualLoop(random.Random(seed), **(settings | options))


# --- virtual time ----------------------------------------------------------------------------------------------------


def test_hours_pass_at_once_and_in_order():
    async def main() -> list[float]:
        loop = asyncio.get_running_loop()

        async def wake(after_s: float) -> float:
            await asyncio.sleep(after_s)
            return loop.time()

        woken = await asyncio.gather(*(wake(hours * 3600) for hours in (5, 1, 3)))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(60):
                await asyncio.Event().wait()
        return [*woken, loop.time()]

    assert virtual().run_until_complete(main()) == [18000.0, 3600.0, 10800.0, 18060.0]


def test_the_seed_decides_who_is_next():
    async def order() -> str:
        written: list[str] = []

        async def write(letter: str) -> None:
            for _ in range(3):
                written.append(letter)
                await asyncio.sleep(0)

        await asyncio.gather(*map(write, "abc"))
        return "".join(written)

    orders = [virtual(seed).run_until_complete(order()) for seed in range(20)]
    assert orders == [virtual(seed).run_until_complete(order()) for seed in range(20)]
    assert len(set(orders)) > 10
    assert virtual(shuffle=False).run_until_complete(order()) == "abcabcabc"


def test_nothing_left_to_wait_for_is_a_deadlock():
    async def wait_for_ever() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Deadlock, match="task 0"):
        virtual().run_until_complete(wait_for_ever())


def test_threads_errors_and_cancelled_timers():
    async def main() -> tuple[int, str]:
        timer = asyncio.get_running_loop().call_later(5, lambda: 1 / 0)
        timer.cancel()
        number = await asyncio.to_thread(lambda: 7)
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 / 0)
        await asyncio.sleep(10)
        return number, asyncio.current_task().get_name()

    assert virtual().run_until_complete(main()) == (7, "task 0")

    async def unheard() -> None:
        asyncio.get_running_loop().call_soon(lambda: 1 / 0)
        await asyncio.sleep(1)

    with pytest.raises(ZeroDivisionError):
        virtual().run_until_complete(unheard())


def test_files_fail_where_they_are_watched_and_only_there(tmp_path):
    faults = Faults(random.Random(0), Rates(disk_fails=1.0))
    watched, other = tmp_path / "run", tmp_path / "other"
    watched.mkdir()
    (watched / "old").write_text("there before")
    with unsafe_files(watched, faults):
        other.write_text("fine")
        assert (watched / "old").read_text() == "there before"
        with pytest.raises(OSError, match="No space left"):
            (watched / "new").write_text("lost")
        with pytest.raises(OSError, match="No space left"):
            (watched / "folder").mkdir()
    (watched / "new").write_text("fine")
    with pytest.raises(Crash), unsafe_files(watched, Faults(random.Random(0), Rates(driver_dies_in_io=1.0))):
        (watched / "new").rename(watched / "newer")
    assert (watched / "new").exists()


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_settings_that_are_drawn_are_valid():
    configs = [draw_config(random.Random(seed)) for seed in range(100)]
    for config in configs:
        validate(config)
    assert {config.max_staleness for config in configs} == {0, 1, 2, 3}


def run_seeds(seeds: Iterable[int], package_parent: Path, **environment: str) -> list[dict]:
    """Outcomes up to the first broken promise, in a process that has the package from there."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("seeds.py")), *map(str, seeds)],
        cwd=package_parent,
        env=os.environ | {"PYTHONPATH": str(package_parent)} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_no_promise_is_broken():
    outcomes = simulate_all(range(SEEDS), num_workers=2)
    assert not [(outcome.seed, outcome.violation) for outcome in outcomes if outcome.violation]
    found = summary(outcomes)
    # Every kind of fault has happened, and runs have ended in every way: the promises were put to the test.
    kinds = {*Rates.__dataclass_fields__, "damaged"}
    assert kinds <= set(found["faults"]), kinds - set(found["faults"])
    assert {"finished", "killed", "stopped", "LoopError", "OSError", "JudgeUnavailable"} <= set(found["lives"])
    assert found["lives"]["finished"] > SEEDS * 0.9


def test_what_no_fault_explains_is_a_broken_promise():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    everything = dict.fromkeys(Rates.__dataclass_fields__, 9)
    assert explains_failure({"disk_fails": 1}, full) and not explains_failure({"lost": 1}, full)
    assert not explains_failure({"disk_fails": 1}, TimeoutError())
    assert not explains_failure({"disk_fails": 1}, OSError("another one"))
    assert explains_failure({"late": 1, "refused": 1}, LoopError("the learner is stuck: it has answered nothing"))
    assert not explains_failure({"engine_dies": 1}, LoopError("the learner is stuck: it has answered nothing"))
    assert not explains_failure(everything, RuntimeError("a defect"))
    lost = PoolError("engine 0 was lost 4 times")
    assert explains_failure({"engine_dies": 3, "lost": 1}, lost) and not explains_failure({"engine_dies": 3}, lost)
    assert explains_drop({"judge_fails": 3}, "unreadable reply", dynamic_sampling=False)
    assert not explains_drop({"judge_fails": 2}, "unreadable reply", dynamic_sampling=False)
    assert not explains_drop({"engine_dies": 9}, "unreadable reply", dynamic_sampling=False)
    assert not explains_drop(everything, "engine lost", dynamic_sampling=True)
    assert explains_drop({}, NO_SPREAD, dynamic_sampling=True)
    assert not explains_drop({}, NO_SPREAD, dynamic_sampling=False)


def test_a_seed_replays_event_by_event_in_another_process():
    first = run_seeds(range(12), PACKAGE.parent, PYTHONHASHSEED="1")
    second = run_seeds(reversed(range(12)), PACKAGE.parent, PYTHONHASHSEED="2")
    assert first == second[::-1]
    assert len({outcome["digest"] for outcome in first}) == 12


# --- planted bugs ----------------------------------------------------------------------------------------------------


def broken_by(mutation: Mutation, folder: Path, num_seeds: int) -> dict:
    """The first seed that finds the mutation in a copy of the package, with what it says; {} when none does."""
    shutil.copytree(PACKAGE, folder / "sif_ray", ignore=shutil.ignore_patterns("*.html", "*.svg"))
    file = folder / "sif_ray" / mutation.file
    text = file.read_text()
    assert text.count(mutation.old) == 1, f"{mutation.name}: the text to change is not there once"
    file.write_text(text.replace(mutation.old, mutation.new))
    last = run_seeds(range(num_seeds), folder)[-1]
    return last if last["violation"] else {}


@pytest.mark.parametrize("mutation", {one.promise: one for one in MUTATIONS}.values(), ids=lambda one: one.promise)
def test_a_planted_bug_is_found(mutation, tmp_path):
    assert broken_by(mutation, tmp_path, MUTANT_SEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_planted_bug_is_found(mutation, tmp_path):
    found = broken_by(mutation, tmp_path, MUTANT_SEEDS)
    print(
        f"\n{mutation.promise}: {mutation.name}: seed {found.get('seed')}: {found.get('violation', 'NOT FOUND')[:200]}"
    )
    assert found
