"""The Ray cluster of a run: joined or started, and left without a process behind."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping

from sif_ray.config import RayConfig

log = logging.getLogger(__name__)

SERVE_ENVIRONMENT = {
    # Requests between deployments over gRPC and without a second thread or loop in each process: a third less work.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",  # part of the above; each gateway would want a port of its own
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",  # else a request's line stands in the log a thousand requests later
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # of a controller that otherwise looks ten times a second at nothing
}
"""Of every process of a cluster that serves. `ray_session` sets it for clusters that it starts."""

_ENVIRONMENT = SERVE_ENVIRONMENT | {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
    # An engine's processes are children of a Ray worker: the raylet ends them when the worker dies, however it dies.
    "RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper": "true",
}
_WORKERS_ONLY = {
    "TQDM_DISABLE": "1",  # the loading bars of other libraries; ours are drawn where the run was started
    "TRANSFORMERS_VERBOSITY": "error",
    "PILLOW_BLOCKS_MAX": "8",  # memory of decoded pictures is used again: fresh pages cost as much as the decoding
}


@contextlib.contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """Ray for the body: a session that is already up is used and left up; otherwise one is joined or started, and left
    or ended with the body, also after an error or an interrupt.

    The address "local" starts a cluster of this process's own, whatever else runs on the machine.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    if config.address == "local":
        # The workers' variables are inherited by every process of the cluster.
        with _own_sigterm(), _defaults_in_environment(_WORKERS_ONLY):
            ray.init(
                address="local",
                num_cpus=config.local_cpus,
                object_store_memory=config.object_store_mib * 2**20,
                include_dashboard=True,  # Ray Train asks it how the controller is
            )
    else:
        with _own_sigterm():
            ray.init(address=config.address)
    log.info("Ray %s with %s", ray.__version__, _resources(ray.cluster_resources()))
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's answer to SIGTERM, which `ray.init` replaces by one that prints a native stack trace."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _defaults_in_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set what the user has not set, for the body."""
    missing = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]


def _resources(total: dict[str, float]) -> str:
    return ", ".join(f"{total[name]:g} {name}" for name in ("CPU", "GPU") if name in total)
