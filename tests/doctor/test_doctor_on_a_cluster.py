"""The doctor on real Ray nodes with token authentication, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

JOB = Path(__file__).parents[2] / "jobs" / "doctor.py"
TOKEN = "a-token-of-this-cluster-0123456789abcdef"
# The first node has the key of the judge, the second a line break behind it.
NODES = """
import os, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
os.environ["DOCTOR_JUDGE_KEY"] += chr(10)
cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def environ() -> dict[str, str]:
    return os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "DOCTOR_JUDGE_KEY": "sk-0123456789"}


@pytest.fixture(scope="module")
def address(environ) -> Iterator[str]:
    """Of a cluster with two nodes, which ends with its standard input."""
    process = subprocess.Popen(
        [sys.executable, "-c", NODES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
    )
    found = ""
    while ":" not in found:
        found = process.stdout.readline().strip()
        assert process.poll() is None
    yield found.split()[-1]
    process.communicate(timeout=60)


def doctor(arguments, environ, folder) -> tuple[int, dict, str]:
    file = folder / "findings.json"
    done = subprocess.run(
        [sys.executable, JOB, *arguments, "--json", str(file)], env=environ, cwd=folder, capture_output=True, text=True
    )
    return done.returncode, json.loads(file.read_text()), done.stdout + done.stderr


def test_every_node_is_examined(address, environ, tmp_path):
    status, found, shown = doctor(["--address", address], environ, tmp_path)
    assert status == 0, shown
    memory = [finding for finding in found["findings"] if finding["check"] == "memory"]
    assert len({finding["node"] for finding in memory}) == 2 and sum("(head)" in f["node"] for f in memory) == 1
    levels = {finding["check"]: finding["level"] for finding in found["findings"]}
    assert levels["versions on all nodes"] == levels["clocks"] == "ok"
    assert levels["network between nodes"] in ("ok", "note")
    [link] = [finding["found"] for finding in found["findings"] if finding["check"] == "network between nodes"]
    assert "1 links: at least" in link
    assert TOKEN not in shown + json.dumps(found)


def test_a_key_that_is_wrong_on_one_node_is_found_there(address, environ, tmp_path):
    request = ["grpo", "data=nowhere", "policy=toy", f"output={tmp_path / 'grpo'}", f"ray.address={address}"]
    judge = ["judge.kind=llm", "judge.model=m", "judge.base_url=http://127.0.0.1:9/v1"]
    status, found, shown = doctor([*request, *judge, "judge.api_key_env=DOCTOR_JUDGE_KEY"], environ, tmp_path)
    assert status == 1
    faults = {(finding["check"], finding["node"]) for finding in found["findings"] if finding["level"] == "fault"}
    keys = [node for check, node in faults if check == "key: DOCTOR_JUDGE_KEY"]
    assert len(keys) == 1 and keys[0] and "(head)" not in keys[0]
    assert {check for check, _ in faults} == {"key: DOCTOR_JUDGE_KEY", "judge: endpoint", "dataset: data"}
    assert len([node for check, node in faults if check == "judge: endpoint"]) == 3  # two nodes and the driver
    seen = [finding for finding in found["findings"] if finding["check"] == "folder: output on every node"]
    assert [finding["level"] for finding in seen] == ["ok"] and not list(tmp_path.glob(".probe-*"))
    assert "sk-0123456789" not in shown + json.dumps(found)


def test_a_wrong_token_is_a_fault_and_no_wait(address, environ, tmp_path):
    status, found, shown = doctor(
        ["--address", address], environ | {"RAY_AUTH_TOKEN": "another-token-012345"}, tmp_path
    )
    assert status == 1
    [fault] = [finding for finding in found["findings"] if finding["level"] == "fault"]
    assert fault["check"] == "Ray cluster" and "RAY_AUTH_TOKEN" in fault["fix"]
    assert "another-token-012345" not in shown + json.dumps(found)
