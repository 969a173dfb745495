"""The process environment that vLLM and its child processes read while an engine starts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from sif_ray.config import EngineConfig
from sif_ray.rollout.orphans import OWNER_VARIABLE


def engine_environment(config: EngineConfig) -> dict[str, str]:
    """Variables for the start of one engine owned by this process, to be set before vLLM is imported."""
    return {
        "OMP_NUM_THREADS": str(config.threads),
        OWNER_VARIABLE: str(os.getpid()),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # Ray places engines; binding would put all of them on the first cores
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),  # warnings are about its own defaults
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",  # a worker has nothing to save
    }


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """The process environment with `variables` inside the block, as it was outside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
