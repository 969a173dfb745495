"""The processes of engines, as a test that owns them sees them."""

from __future__ import annotations

import psutil


def engine_processes() -> list[psutil.Process]:
    """vLLM's processes below this one, engine cores and workers. The name is the kernel's, which has 15 characters."""
    return [process for process in psutil.Process().children(recursive=True) if process.name().startswith("VLLM::")]
