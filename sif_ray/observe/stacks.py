"""Where a process is: the stacks of its threads and of its asyncio tasks."""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def thread_stacks() -> str:
    """The Python stacks of all threads of this process, the innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame)).rstrip()}"
        for ident, frame in sys._current_frames().items()
    )


def task_stacks(loop: asyncio.AbstractEventLoop | None = None) -> str:
    """Where the other asyncio tasks of an event loop wait, outermost call first; equal ones share a line.

    `loop` None = the one that runs here; another one may be looked at from another thread.

    Example line: `3 tasks: grpo.py:383 _roll_out > pool.py:164 call > pool.py:173 _while_alive > locks.py:213 wait`.
    """
    own = asyncio.current_task() if loop is None else None
    counts = Counter(" > ".join(_frames(task)) for task in asyncio.all_tasks(loop) if task is not own)
    return "\n".join(f"{count} task{'s' * (count > 1)}: {stack}" for stack, count in sorted(counts.items()))


def _frames(task: asyncio.Task[Any]) -> Iterator[str]:
    awaited: Any = task.get_coro()
    while awaited is not None:
        # Coroutines, asynchronous generators and plain generators name the same two things differently.
        frame = next((frame for kind in ("cr", "ag", "gi") if (frame := getattr(awaited, f"{kind}_frame", None))), None)
        if frame is not None:
            yield f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
        inner = (getattr(awaited, name, None) for name in ("cr_await", "ag_await", "gi_yieldfrom"))
        awaited = next((found for found in inner if found is not None), None)
