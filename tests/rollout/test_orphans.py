"""Processes of an engine end when their owner is killed, also when the processes between them would live on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import psutil
import pytest

from sif_ray.rollout.orphans import OWNER_VARIABLE

WORKER = (
    "import time; from sif_ray.rollout.orphans import end_with_owner; end_with_owner(); print('up'); time.sleep(600)"
)
CORE = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-u", "-c", sys.argv[1]])
time.sleep(600)
"""
OWNER = """
import os, subprocess, sys, time
os.environ[sys.argv[1]] = str(os.getpid())
subprocess.Popen([sys.executable, "-u", *sys.argv[2:]])
time.sleep(600)
"""


@pytest.mark.parametrize("chain", [["-c", CORE, WORKER], ["-c", WORKER]], ids=["core-and-worker", "one-process"])
def test_killing_the_owner_ends_its_engine(chain: list[str]) -> None:
    command = [sys.executable, "-c", textwrap.dedent(OWNER), OWNER_VARIABLE, *chain]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "up\n"
    engine = psutil.Process(owner.pid).children(recursive=True)
    assert len(engine) == len(chain) - 1
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    _, alive = psutil.wait_procs(engine, timeout=60)
    for process in alive:
        process.kill()
    assert not alive


def test_a_process_without_an_owner_is_left_alone() -> None:
    environment = {name: value for name, value in os.environ.items() if name != OWNER_VARIABLE}
    code = "from sif_ray.rollout.orphans import end_with_owner; end_with_owner(); print('alive')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "alive\n"
