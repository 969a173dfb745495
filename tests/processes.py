"""The processes of engines and actors, as a test that owns them sees them."""

from __future__ import annotations

import contextlib

import psutil


def engine_processes() -> list[psutil.Process]:
    """vLLM's processes below this one, engine cores and workers.

    They are called `VLLM::...` unless setproctitle finds no room for the title: it looks for it beside the first
    variable of the environment, which Ray puts in random order and vLLM changes. Then they keep the command that
    spawned them.
    """
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            command = " ".join(process.cmdline())
            if command.startswith("VLLM::") or "multiprocessing.spawn import spawn_main" in command:
                found.append(process)
    return found


def processes_named(title: str) -> list[psutil.Process]:
    """Processes below this one whose title begins so; Ray names workers by what they do."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if (process.cmdline() or [""])[0].startswith(title):
                found.append(process)
    return found
