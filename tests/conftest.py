"""What every test needs: a quiet offline environment, one small Ray, and proof that nothing is left running."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator

from sif_ray.runtime import SERVE_ENVIRONMENT, haproxy_environment

# Before Ray, vLLM or tokenizers are imported; processes that tests start inherit it.
os.environ |= SERVE_ENVIRONMENT | {
    "AWS_ACCESS_KEY_ID": "nobody",  # at the S3 server that tests start; the keys of whoever runs them stay out
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; vLLM's default takes half the memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
os.environ.pop("RAY_ADDRESS", None)  # a cluster that happens to run here is not the tests'

import psutil
import pytest

GRACE_S = 20.0  # for processes that are on their way out
POLL_S = 0.5
# Helpers of the interpreter itself, which live exactly as long as it does.
OWN_HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


class DescendantLog:
    """Remembers every process below this one, so that one is known again after its parent has died.

    Neither the parent link nor the environment would do: an orphan has another parent, and vLLM's and Ray's processes
    overwrite their environment when they set their title.
    """

    def __init__(self) -> None:
        self._known: dict[int, psutil.Process] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="descendant-log", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(POLL_S):
            self._look()

    def _look(self) -> None:
        for process in psutil.Process().children(recursive=True):
            self._known[process.pid] = process

    def survivors(self, grace_s: float) -> list[psutil.Process]:
        """Stop watching and return what still runs after `grace_s` seconds at most (zombies have ended)."""
        self._stop.set()
        self._thread.join()
        self._look()
        _, alive = psutil.wait_procs([p for p in self._known.values() if _runs(p)], timeout=grace_s)
        return [process for process in alive if _runs(process)]


def _runs(process: psutil.Process) -> bool:
    try:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return False
        return not any(name in part for part in process.cmdline() for name in OWN_HELPERS)
    except psutil.NoSuchProcess:
        return False


def _name(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:120] or process.name()}"
    except psutil.NoSuchProcess:
        return f"{process.pid} (ended meanwhile)"


@pytest.fixture(scope="session", autouse=True)
def no_process_left_behind() -> Iterator[None]:
    """The session fails if a process started by a test outlives it; set up first, so torn down last."""
    descendants = DescendantLog()
    yield
    survivors = descendants.survivors(GRACE_S)
    if survivors:
        names = "\n".join(_name(process) for process in survivors)
        for process in survivors:
            process.kill()
        pytest.fail(f"{len(survivors)} processes were left behind (and are killed now):\n{names}", pytrace=False)


@pytest.fixture(scope="session")
def ray_local(no_process_left_behind: None) -> Iterator[None]:
    """A Ray of this test session's own: 4 logical CPUs, small object store, no dashboard."""
    import ray

    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,  # short: it holds sockets
        haproxy_environment() as haproxy,
        pytest.MonkeyPatch.context() as environment,
    ):
        for name, value in haproxy.items():
            environment.setenv(name, value)
        ray.init(
            address="local",
            num_cpus=4,
            object_store_memory=200 * 1024**2,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
        )
        yield
        ray.shutdown()
