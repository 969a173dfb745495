"""Stacks of tasks and threads that wait."""

from __future__ import annotations

import asyncio
import threading

from sif_ray.observe.stacks import task_stacks, thread_stacks


def test_stacks_go_down_to_what_a_task_awaits_and_count_equal_ones():
    async def inner() -> None:
        await asyncio.Event().wait()

    async def outer() -> None:
        await inner()

    async def main() -> str:
        tasks = [asyncio.create_task(outer()) for _ in range(3)]
        await asyncio.sleep(0)
        found = task_stacks()
        for task in tasks:
            task.cancel()
        return found

    (line,) = asyncio.run(main()).splitlines()
    assert line.startswith("3 tasks: test_stacks.py:")
    assert [part.split()[-1] for part in line.split(" > ")] == ["outer", "inner", "wait"]


def test_tasks_of_a_blocked_loop_are_seen_from_another_thread():
    blocked, seen = threading.Event(), threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def waits() -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        waiting = asyncio.create_task(waits())
        await asyncio.sleep(0)
        blocked.set()
        seen.wait(10)
        waiting.cancel()

    thread = threading.Thread(target=asyncio.run, args=(main(),), name="the blocked one")
    thread.start()
    blocked.wait(10)
    try:
        assert any(line.endswith(" wait") and " waits > " in line for line in task_stacks(loops[0]).splitlines())
        (stack,) = (part for part in thread_stacks().split("thread ") if part.startswith("the blocked one:"))
        assert "seen.wait(10)" in stack
    finally:
        seen.set()
        thread.join()
