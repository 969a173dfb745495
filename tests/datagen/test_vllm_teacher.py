"""The tiny policy as teacher, served by vLLM in processes of its own. What it writes is checked like any reply."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import psutil
import pytest
from toy_drafts import toy_drafts

from sif_ray.config import EngineConfig, GenerateConfig, TeacherConfig
from sif_ray.datagen.chat_teacher import TeacherUnavailable
from sif_ray.datagen.checks import EXPLANATIONS
from sif_ray.datagen.model_traces import ModelTraces
from sif_ray.datagen.vllm_server import VllmServer
from sif_ray.observe import jsonl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ENGINE = EngineConfig(max_model_len=4096, max_num_seqs=8)
END_TIMEOUT_S = 30.0
OWNER = """
import sys, time
from pathlib import Path
from sif_ray.config import EngineConfig
from sif_ray.datagen.vllm_server import VllmServer
server = VllmServer("toy", EngineConfig(), Path(sys.argv[1]))
print("up", flush=True)
time.sleep(600)
"""


async def test_the_tiny_policy_teaches(tmp_path):
    teacher = TeacherConfig(kind="vllm", model="toy", engine=ENGINE, temperature=0.5, timeout_s=120.0)
    config = GenerateConfig(output=str(tmp_path), splits={"train": 4}, decimals=2, teacher=teacher)
    drafts = toy_drafts(config)
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    traces = ModelTraces(config)
    served_by = [process for process in psutil.Process().children(recursive=True) if process.pid not in before]
    try:
        made = await traces(drafts)
        again = await traces(drafts)
        [log] = (tmp_path / "teacher").glob("audit-*.jsonl")
        lines = jsonl.read(log)
        served_by[0].kill()
        with pytest.raises(TeacherUnavailable, match="vLLM ended with status -9"):
            await traces(drafts)
    finally:
        await traces.close()
    assert again == made
    for draft, original in zip(made, drafts, strict=True):
        assert draft.sample.sample_id == original.sample.sample_id
        assert draft.reasons and set(draft.reasons) <= EXPLANATIONS.keys(), "it was never taught to teach"
    assert {line["error"] for line in lines} == {""}
    assert len(lines) == 2 * 2 * len(drafts), "each reply was repaired once, in both rounds"
    assert any(line["reply"] for line in lines)
    assert len(served_by) >= 2
    assert not psutil.wait_procs(served_by, timeout=END_TIMEOUT_S)[1]


def test_killing_the_owner_ends_the_server(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(OWNER), str(tmp_path / "log")]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "up\n"
    server = psutil.Process(owner.pid).children(recursive=True)
    assert len(server) >= 2
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    _, alive = psutil.wait_procs(server, timeout=END_TIMEOUT_S)
    for process in alive:
        process.kill()
    assert not alive


def test_a_server_that_does_not_start_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)vLLM did not start.*max_model_len"):
        VllmServer("toy", replace(ENGINE, max_model_len=10**7), tmp_path / "log")
