"""The processes of engines and actors, as a test that owns them sees them."""

from __future__ import annotations

import contextlib

import psutil


def engine_processes() -> list[psutil.Process]:
    """vLLM's processes below this one, engine cores and workers. The name is the kernel's, which has 15 characters."""
    return [process for process in psutil.Process().children(recursive=True) if process.name().startswith("VLLM::")]


def processes_named(title: str) -> list[psutil.Process]:
    """Processes below this one whose title begins so; Ray names workers by what they do."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if (process.cmdline() or [""])[0].startswith(title):
                found.append(process)
    return found
