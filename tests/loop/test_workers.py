"""Ray actors as workers of a pool: started, dead, blocked, ended."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray

from sif_ray.loop.pool import WorkerDiedError
from sif_ray.loop.workers import ActorFactory
from sif_ray.observe.stacks import thread_stacks


@ray.remote(max_concurrency=8, concurrency_groups={"stacks": 1})
class Toy:
    def __init__(self, broken: bool = False) -> None:
        self.broken = broken

    async def start(self) -> None:
        if self.broken:
            raise OSError("no memory")

    async def pid(self) -> int:
        return os.getpid()

    async def block(self) -> None:
        time.sleep(60)

    async def refuse(self) -> None:
        raise KeyError("p7")

    @ray.method(concurrency_group="stacks")
    async def stacks(self) -> str:
        return thread_stacks()


def factory(broken: bool = False) -> ActorFactory:
    return ActorFactory(lambda name: Toy.options(num_cpus=0).remote(broken), start="start")


def ended(pid: int) -> bool:
    try:
        psutil.Process(pid).wait(timeout=20)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True


def test_death_of_the_process_and_errors_of_the_object_are_told_apart(ray_local):
    async def main() -> None:
        toys = factory()
        worker = await toys.start("toy 0")
        with pytest.raises(KeyError, match="p7"):
            await worker.refuse()
        pid = await worker.pid()
        blocked = asyncio.ensure_future(worker.block())
        await asyncio.sleep(0.5)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerDiedError, match=r"^its worker process has died"):
            await blocked
        with pytest.raises(WorkerDiedError):
            await worker.pid()
        assert "not available" in await toys.stacks(worker)
        await toys.end(worker)

    asyncio.run(main())


def test_worker_that_ray_ends_for_want_of_memory_has_died():
    program = Path(__file__).with_name("memory_eater.py")
    told = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=120)
    assert "killed due to the node running low on memory" in told.stdout, told.stderr[-2000:]


def test_blocked_worker_shows_where_it_is_and_is_ended(ray_local):
    async def main() -> int:
        toys = factory()
        worker = await toys.start("toy 0")
        pid = await worker.pid()
        blocked = asyncio.ensure_future(worker.block())
        await asyncio.sleep(0.5)
        assert "time.sleep(60)" in await toys.stacks(worker)
        await toys.end(worker)
        with pytest.raises(WorkerDiedError):
            await blocked
        return pid

    assert ended(asyncio.run(main()))


def test_worker_that_cannot_start_or_is_not_waited_for_leaves_no_process(ray_local):
    async def main() -> None:
        with pytest.raises(OSError, match="no memory"):
            await factory(broken=True).start("toy 0")
        starting = asyncio.ensure_future(factory().start("toy 1"))
        await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    asyncio.run(main())
    deadline_s = time.monotonic() + 20
    while any(actor["state"] != "DEAD" for actor in _toys()):
        assert time.monotonic() < deadline_s, _toys()
        time.sleep(0.2)


def _toys() -> list[dict[str, object]]:
    states = ray._private.state.actors().values()
    return [
        {"state": actor["State"], "class": actor["ActorClassName"]}
        for actor in states
        if actor["ActorClassName"] == "Toy"
    ]
