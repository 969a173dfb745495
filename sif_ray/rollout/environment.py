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
        # Of oneDNN, which a CPU engine computes with: it compiles for every number of tokens that a step has, and keeps
        # 1,024 of these, half a GB for the toy policy, by default. With 64 it is as fast.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64"),
        "OMP_NUM_THREADS": str(config.threads),
        OWNER_VARIABLE: str(os.getpid()),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # Ray places engines; binding would put all of them on the first cores
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),  # warnings are about its own defaults
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",  # a worker has nothing to save
    }


def executor(config: EngineConfig, *, on_cpu: bool) -> str | None:
    """What runs the workers of an engine, as vLLM's `distributed_executor_backend`; None = vLLM's own choice.

    Several workers are processes of this one's; in a placement group vLLM would make them Ray actors. A single one
    runs inside the engine core, also on a CPU, where "uni" is turned into "mp": the worker would be a process of its
    own for the sake of a thread binding that is off here, and core and worker would wait for each other by spinning.
    """
    if config.tensor_parallel_size > 1:
        return "mp"
    return "vllm.v1.executor.uniproc_executor.UniProcExecutor" if on_cpu else None


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
