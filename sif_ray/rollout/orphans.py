"""End the processes of an engine when the process that owns it dies, however it dies.

vLLM runs an engine in processes of its own: owner -> engine core -> workers (or the worker inside the engine core). A
worker ends with its engine core, but an engine core whose owner was killed runs on. So the worker watches the owner
and takes the engine core with it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading

OWNER_VARIABLE = "SIF_RAY_ENGINE_OWNER"
"""Environment variable with the process id of the engine's owner; set while the engine starts, inherited by it."""


def end_with_owner() -> None:
    """Watch the owner named in the environment from a thread; does nothing where none is named.

    Linux only (process file descriptors), which is where vLLM runs. Call it once, in a worker process.
    """
    owner = int(os.environ.get(OWNER_VARIABLE, os.getpid()))
    if owner == os.getpid():
        return
    parent = os.getppid()
    engine_core = _open(parent) if parent != owner else None
    watched = _open(owner)
    threading.Thread(target=_wait_and_end, args=(watched, engine_core), name="engine-owner", daemon=True).start()


def end_group_with_owner() -> None:
    """The same for the leader of a process group: the whole group ends. Call it before the leader starts others."""
    watched = _open(int(os.environ[OWNER_VARIABLE]))

    def wait_and_end() -> None:
        if watched is not None:
            select.select([watched], [], [])
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=wait_and_end, name="group-owner", daemon=True).start()


def _open(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _wait_and_end(owner: int | None, engine_core: int | None) -> None:
    if owner is not None:
        select.select([owner], [], [])  # readable once the process has ended
    if engine_core is not None:
        with contextlib.suppress(ProcessLookupError):  # it went first
            signal.pidfd_send_signal(engine_core, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
