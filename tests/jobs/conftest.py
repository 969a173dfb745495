"""One cluster of three nodes for the tests of jobs, and what its first jobs made on it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster_process import ClusterProcess, cluster_process

ROOT = Path(__file__).parents[2]
KEY = "sk-marked-6f1d0a7c93e2"  # of a judge; whoever finds it anywhere has found a leak
KEY_NAME = "SIF_RAY_TEST_JUDGE_KEY"

Submit = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="package")
def cluster() -> Iterator[ClusterProcess]:
    with cluster_process(4, {KEY_NAME: KEY}) as running:
        running.add_node(2)
        running.add_node(2)
        yield running


@pytest.fixture(scope="package")
def submit(cluster: ClusterProcess) -> Submit:
    """Starts `python jobs/submit.py` with the given arguments, and collects what it prints.

    The nodes have this checkout, as they would in an image. Nodes of one machine unpack a checkout that is sent along
    into one folder, which each removes when it needs it no more.
    """

    def start(*arguments: object) -> subprocess.Popen[str]:
        options = ("--address", cluster.address, "--working-dir", "")
        command = [sys.executable, "jobs/submit.py", *options, *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=ROOT, env=cluster.environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )

    return start


def finished(process: subprocess.Popen[str], status: int = 0) -> str:
    """What the process printed; it must end with this status."""
    printed, _ = process.communicate()
    assert process.returncode == status, printed[-5000:]
    return printed


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage that every node sees."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="package")
def data(submit: Submit, folder: Path) -> str:
    """A dataset made by a job."""
    output = f"{folder}/data"
    sizes = ("splits.train=60", "splits.heldout=8")
    finished(submit("generate", "--config", "configs/generate.yaml", f"output={output}", *sizes))
    return output


@pytest.fixture(scope="package")
def policy(submit: Submit, folder: Path, data: str) -> str:
    """A checkpoint made by a job; it has learnt next to nothing."""
    output = f"{folder}/warmup"
    finished(submit("warmup", "--config", "configs/warmup.yaml", f"data={data}", f"output={output}", "epochs=0.5"))
    return f"{output}/checkpoint"
