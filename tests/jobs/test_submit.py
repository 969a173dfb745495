"""`sif-ray submit`: what it refuses, and whose exit status it returns."""

from __future__ import annotations

import argparse

import pytest
from cluster_process import cluster_process
from conftest import ROOT
from ray.dashboard.modules.job.common import JobStatus
from ray.dashboard.modules.job.pydantic_models import JobDetails, JobType

from sif_ray import cli, submit
from sif_ray.config import ConfigError


def parsed(*arguments: str) -> argparse.Namespace:
    return cli.tool_parser("submit").parse_args(arguments)


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("grpo", "--config", "configs/nothing.yaml"), "configs/nothing.yaml: no such file"),
        (("grpo", "--config", "configs/grpo.yaml", "max_steps=many"), "max_steps"),
        (("grpo", "--config", "configs/grpo.yaml", "group_size=1"), "group_size = 1"),
        (("--working-dir", "docs", "grpo"), "--working-dir = 'docs': there is no docs/jobs/grpo.py"),
        (("--run-id", "a run", "grpo"), "--run-id = 'a run'"),
    ],
)
def test_a_request_that_cannot_work_is_refused_before_it_is_sent(arguments, told):
    with pytest.raises(ConfigError) as refused:
        submit.run(parsed("--address", "http://127.0.0.1:1", *arguments))
    assert told in str(refused.value)


def test_a_configuration_that_would_not_be_sent_along_is_refused(tmp_path):
    file = tmp_path / "grpo.yaml"
    file.write_text("max_steps: 3\n")
    with pytest.raises(ConfigError, match="lies outside --working-dir"):
        submit.run(parsed("--address", "http://127.0.0.1:1", "grpo", "--config", str(file)))


def test_a_secret_in_a_runtime_environment_is_refused(tmp_path):
    file = tmp_path / "runtime_env.yaml"
    file.write_text("env_vars: {JUDGE_API_KEY: sk-1}\n")
    with pytest.raises(ConfigError, match=r"env_vars\.JUDGE_API_KEY") as refused:
        submit.run(parsed("--runtime-env", str(file), "grpo", "--config", "configs/grpo.yaml"))
    assert "sk-1" not in str(refused.value)


def test_a_cluster_that_does_not_answer_is_named():
    with pytest.raises(ConfigError, match=r"--address = 'http://127\.0\.0\.1:1'"):
        submit.run(parsed("--address", "http://127.0.0.1:1", "grpo", "--config", "configs/grpo.yaml"))


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 3, 3),
        (JobStatus.FAILED, -9, 137),  # killed, as a shell tells it
        (JobStatus.FAILED, None, 1),  # its runtime environment could not be made
        (JobStatus.STOPPED, -15, 130),
    ],
)
def test_the_exit_status_is_the_jobs(state, code, expected):
    job = JobDetails(type=JobType.SUBMISSION, status=state, entrypoint="python x.py", driver_exit_code=code)
    assert submit.exit_status(job) == expected


@pytest.mark.timeout(200)
def test_a_failed_job_returns_its_own_exit_code():
    with cluster_process(2) as cluster:
        command = ["--address", cluster.address, "data", "inspect", "/nothing/there"]
        done = cluster.run("jobs/submit.py", *command)
        assert done.returncode == cli.WRONG_REQUEST, done.stdout
        assert "/nothing/there: no dataset" in done.stdout
        refused = cluster.run("jobs/submit.py", *command, token="wrong")
        assert refused.returncode == cli.WRONG_REQUEST
        assert "RAY_AUTH_TOKEN" in refused.stdout
        assert cluster.token not in done.stdout + refused.stdout
