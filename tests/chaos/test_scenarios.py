"""Faults in real runs: a short form by default, all by name (`pytest -m slow tests/chaos/test_scenarios.py`)."""

from __future__ import annotations

import pytest

from sif_ray.chaos import strike
from sif_ray.chaos.promise import Violation
from sif_ray.chaos.scenarios import SCENARIOS, Scenario, make_victim, possible, run_scenario
from sif_ray.cli import run_job

BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


@pytest.mark.timeout(900)
def test_engine_killed_in_a_real_run(tmp_path):
    run_scenario(BY_NAME["engine-killed"], tmp_path / "run")


@pytest.mark.slow  # one to two minutes each
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", BY_NAME)
def test_every_scenario(name, tmp_path):
    if not possible(BY_NAME[name]):
        pytest.skip("it makes a disk of its own, which only root may")
    seconds = run_scenario(BY_NAME[name], tmp_path / "run")
    print(f"\n{name}: {seconds:.0f} s from the strike to the end")


def test_a_broken_promise_is_told_and_fails_the_job(monkeypatch, tmp_path):
    def broken(scenario, folder):
        raise Violation(f"{scenario.name} lost a ticket")

    monkeypatch.setattr(strike, "run_scenario", broken)
    assert run_job("chaos strike", ["engine-killed", "--times", "2", "--json", str(tmp_path / "out.json")]) == 1
    assert '"Violation: engine-killed lost a ticket"' in (tmp_path / "out.json").read_text()


def test_a_scenario_that_is_not_there_is_a_wrong_request(capsys):
    assert run_job("chaos strike", ["engine-eaten"]) == 2
    assert "there is no scenario 'engine-eaten'; there are: driver-killed," in capsys.readouterr().err


def test_a_run_that_ends_too_early_is_seen(tmp_path):
    """The checks must not pass for a run that did less."""
    victim = make_victim(tmp_path / "run")
    victim.config.data = "/nowhere"
    victim.start()
    with pytest.raises(Violation, match=r"it ended by 2:(.|\n)*/nowhere"):
        victim.wait_for_steps(1)
    victim.output.mkdir()
    (victim.output / "finished.json").write_text('{"version": 1, "dropped": {}}')
    (victim.output / "trained.jsonl").write_text(
        '{"continue_from": 0, "time_s": 0}\n{"version": 1, "trained": {"0/a": 0}}\n'
    )
    with pytest.raises(Violation, match="1 tickets ended of 56"):
        victim.check_finished()


def test_names_are_unique_and_every_scenario_says_what_it_promises():
    assert len(BY_NAME) == len(SCENARIOS)
    assert all(isinstance(scenario, Scenario) and scenario.promise for scenario in SCENARIOS)
