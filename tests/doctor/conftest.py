"""A healthy machine and a request that can work, so that the only fault is the one that a test plants."""

from __future__ import annotations

import functools
import json
import shutil
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from faulty_http import served
from model_lists import model_list

from sif_ray import cli
from sif_ray.datagen.dataset import FORMAT
from sif_ray.doctor import gpus, leftovers, machine, models, torch_build
from sif_ray.doctor.cgroup import Limits
from sif_ray.doctor.machine import GIB, Machine
from sif_ray.policy.check import check_policy
from sif_ray.toyworld.assets import path

HEALTHY = Machine(
    memory_bytes=64 * GIB,
    free_memory_bytes=60 * GIB,
    cpus=16,
    limits=Limits(None, None),
    shared_bytes=32 * GIB,
    shared_free_bytes=32 * GIB,
    open_files=(65536, 1048576),
)
HEALTHY_TORCH = {
    "torch": "2.13.0+cpu",
    "cuda": None,
    "available": False,
    "warnings": [],
    "nccl": None,
    "error": "",
    "torchvision_error": "",
}
Usage = namedtuple("Usage", "total used free")


@dataclass(frozen=True)
class Diagnosis:
    """What a run of the doctor gave."""

    status: int
    shown: str  # stdout and stderr
    findings: list[dict[str, Any]]
    text: str  # of the JSON file

    @property
    def faults(self) -> list[dict[str, Any]]:
        return [finding for finding in self.findings if finding["level"] == "fault"]


@functools.cache
def check_once(*arguments, **options) -> str:
    """`check_policy`, which takes half a second; a fault is raised anew every time."""
    return check_policy(*arguments, **options)


@pytest.fixture
def doctor(tmp_path, monkeypatch, capfd):
    """Runs `sif-ray doctor ARGUMENTS` in this process, on a machine whose figures are those of `HEALTHY`."""
    monkeypatch.chdir(tmp_path)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(machine, "measure", lambda: HEALTHY)
    monkeypatch.setattr(models, "check_policy", check_once)
    monkeypatch.setattr(leftovers, "own_processes", list)
    monkeypatch.setattr(gpus, "find_gpus", list)
    monkeypatch.setattr(torch_build, "probe_torch", lambda: HEALTHY_TORCH)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: Usage(10**12, 10**11, 9 * 10**11))

    def run(*arguments: str) -> Diagnosis:
        file = tmp_path / "findings.json"
        status = cli.main(["doctor", *map(str, arguments), "--json", str(file)])
        captured = capfd.readouterr()
        text = file.read_text() if file.exists() else ""
        findings = json.loads(text)["findings"] if text else []
        return Diagnosis(status, captured.out + captured.err, findings, text)

    return run


@pytest.fixture
def data(tmp_path) -> Path:
    """A finished dataset, as far as its files say."""
    folder = tmp_path / "data"
    shard = "data/00000.parquet"
    (folder / shard).parent.mkdir(parents=True)
    (folder / shard).touch()
    counts = {"splits": {"train": {"accepted": 256}, "empty": {"accepted": 0}}}
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, "counts": counts, "shards": {shard: {}}}))
    return folder


@pytest.fixture
def policy(tmp_path) -> Path:
    return Path(shutil.copytree(path("tiny_policy"), tmp_path / "policy"))


@pytest.fixture
def grpo(data, tmp_path) -> list[str]:
    """A request of the stage `grpo` that can work."""
    return ["grpo", f"data={data}", "policy=toy", f"output={tmp_path / 'grpo'}"]


@pytest.fixture
def judge(monkeypatch):
    """(address of a server with the model "judge" and the key "sk-the-right-key", settings that use it)."""
    monkeypatch.setenv("DOCTOR_JUDGE_KEY", "sk-the-right-key")
    with served(model_list("sk-the-right-key", ["judge", "another"])) as url:
        settings = ["judge.kind=llm", "judge.model=judge", f"judge.base_url={url}/v1"]
        yield url, [*settings, "judge.api_key_env=DOCTOR_JUDGE_KEY"]
