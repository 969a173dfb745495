"""The book of finished stages: nothing is repeated that is unchanged, nothing is kept that is stale."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sif_ray.config import GrpoConfig, WarmupConfig
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
