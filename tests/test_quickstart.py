"""Nothing finished and unchanged is repeated, nothing stale is kept, and an interrupt leaves no process behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from sif_ray.config import EvaluateConfig, GrpoConfig, WarmupConfig
from sif_ray.quickstart import StageBook

STAGES = [("warmup", WarmupConfig()), ("grpo", GrpoConfig())]


def run_all(path, stages) -> list[str]:
    ran: list[str] = []
    book = StageBook(path)
    for name, config in stages:
        book.run(name, lambda _, name=name: ran.append(name), config)
    return ran


def test_a_second_run_picks_up_finished_stages(tmp_path):
    book = tmp_path / "stages.json"
    assert run_all(book, STAGES) == ["warmup", "grpo"]
    assert run_all(book, STAGES) == []


def test_a_changed_stage_is_run_again_with_all_after_it(tmp_path):
    book = tmp_path / "stages.json"
    run_all(book, STAGES)
    warmup, grpo = STAGES
    assert run_all(book, [warmup, ("grpo", replace(grpo[1], seed=1))]) == ["grpo"]
    assert run_all(book, [("warmup", replace(warmup[1], seed=1)), ("grpo", replace(grpo[1], seed=1))]) == [
        "warmup",
        "grpo",
    ]


def test_where_it_runs_does_not_matter(tmp_path):
    book = tmp_path / "stages.json"
    run_all(book, STAGES)
    elsewhere = [(name, replace(config, ray=replace(config.ray, num_cpus=7))) for name, config in STAGES]
    assert run_all(book, elsewhere) == []


def test_a_stage_that_failed_is_not_noted(tmp_path):
    book = StageBook(tmp_path / "stages.json")

    def fail(_):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError):
        book.run("warmup", fail, WarmupConfig())
    assert run_all(tmp_path / "stages.json", STAGES) == ["warmup", "grpo"]


@pytest.mark.parametrize(("name", "config"), [("grpo", GrpoConfig()), ("evaluate", EvaluateConfig())])
def test_an_interrupted_stage_goes_on_and_one_with_other_inputs_starts_over(name, config, tmp_path):
    resumes: list[bool] = []

    def interrupted(config):
        resumes.append(config.resume)
        raise KeyboardInterrupt

    for warmup in (WarmupConfig(), WarmupConfig(), WarmupConfig(seed=1)):
        book = StageBook(tmp_path / "stages.json")
        book.run("warmup", lambda _: None, warmup)
        with pytest.raises(KeyboardInterrupt):
            book.run(name, interrupted, config)
    assert resumes == [True, True, False]


# --- interrupted -----------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
SMALL = (
    *("generate.splits.warmup=24", "generate.splits.grpo=40", "generate.splits.heldout=4"),
    *("warmup.epochs=0.5", "grpo.groups_per_step=4", "grpo.group_size=4", "evaluate.draws=1"),
)
GONE_WITHIN_S = 30.0


@pytest.mark.parametrize(
    ("line", "sent"),
    [
        ("Started training worker group", signal.SIGINT),
        # After the warm-up in the same process: Ray Train takes Ctrl-C for itself unless it is kept from it.
        *(
            pytest.param(line, sent, marks=pytest.mark.slow)
            for line in ("engine 0 is ready", "generate: starting", "evaluate: starting", "serve: starting")
            for sent in (signal.SIGINT, signal.SIGTERM)
        ),
        pytest.param("Started training worker group", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_ends_with_130_and_leaves_no_process(tmp_path, line, sent):
    command = [sys.executable, "-u", "jobs/quickstart.py", "--config", "configs/quickstart.yaml"]
    log = tmp_path / "log"
    with log.open("w") as output:
        run = subprocess.Popen(
            [*command, f"run_dir={tmp_path / 'run'}", *SMALL], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        wait_for_line(run, log, line)
        started = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(sent)
        assert run.wait(timeout=150) == 130, log.read_text()
        _, alive = psutil.wait_procs([process for process in started if is_up(process)], timeout=GONE_WITHIN_S)
        assert not [process for process in alive if is_up(process)]
    finally:
        run.kill()
        run.wait()


def wait_for_line(run: subprocess.Popen, log: Path, line: str) -> None:
    while line not in log.read_text():
        assert run.poll() is None, log.read_text()
        time.sleep(0.2)


def is_up(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
