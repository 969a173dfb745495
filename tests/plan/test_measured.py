"""Rates that a simulated run was given are found again in the files that such a run would have written."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scenarios import changed

from sif_ray import config as configuration
from sif_ray.config import ConfigError, GrpoConfig
from sif_ray.observe.run_folder import RunFolder
from sif_ray.plan.command import scenario_of
from sif_ray.plan.figures import figures_of
from sif_ray.plan.measured import read_measurements
from sif_ray.plan.scenario import LearnerRates, Lengths
from sif_ray.plan.simulation import Simulation

CONFIG = GrpoConfig(groups_per_step=4, group_size=4, max_staleness=2)
TRUE = changed(
    num_steps=40,
    group_size=4,
    max_staleness=2,
    max_num_seqs=64,
    lengths=Lengths(60.0, 200),
    rates={
        "decode_step_s": tuple(0.01 + 0.0005 * count for count in range(65)),
        "learner": LearnerRates(step_s=0.3, token_s=0.001),
        "request_s": 0.1,
        "score_s": 0.05,
        "transfer_s": 0.2,
        "pause_s": 0.1,
        "decode_slowdown": 1.5,
    },
)


class Recorded(Simulation):
    """Writes the spans that the loop writes."""

    def __init__(self, scenario, folder: Path) -> None:
        super().__init__(scenario)
        self.timeline = RunFolder(folder, replace(CONFIG)).timeline()
        self.begun: dict[int, float] = {}
        self.trains: tuple[float, int] = (0.0, 0)

    def _begin(self, place, lease) -> None:
        self.begun[id(lease)] = self._now_s
        super()._begin(place, lease)

    def _generated(self, place, group) -> None:
        self.timeline.span(
            f"engine {place.number}",
            "generate",
            self.begun[id(group.key)],
            self._now_s,
            step=0,
            prompt_tokens=50,
            tokens=list(group.lengths),
        )
        self.timeline.span("reward 0", "score", self._now_s, self._now_s + self._rates.score_s, step=0)
        super()._generated(place, group)

    def _trained(self, batch, groups, seconds) -> None:
        self.timeline.span("learner 0", "train", self._now_s - seconds, self._now_s, step=batch.version)
        super()._trained(batch, groups, seconds)

    def _end_sync_if_received(self) -> None:
        ends = self._syncing and not self._to_receive
        if ends:
            began_s = self._now_s - self._rates.transfer_s - self._rates.pause_s
            self.timeline.span("sync", "sync", began_s, self._now_s, step=self._published)
        super()._end_sync_if_received()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    run = Recorded(TRUE, folder)
    outcome = run.run()
    run.timeline.close()
    lines = [
        {"step": number, "time_s": step.end_s, "trained_tokens": step.tokens, "sync_pause_s": TRUE.rates.pause_s}
        for number, step in enumerate(outcome.steps, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_rates_of_the_stages_are_found(recorded):
    found = read_measurements(recorded)
    rates = found.rates
    assert rates.learner.token_s == pytest.approx(0.001, rel=1e-6)
    assert rates.learner.step_s == pytest.approx(0.3, rel=1e-6)
    assert (rates.score_s, rates.transfer_s, rates.pause_s) == pytest.approx((0.05, 0.2, 0.1))
    assert found.prompt_tokens == 50 and found.lengths.mean == pytest.approx(60, rel=0.1)
    # what an engine does is told from whole groups, whose sequences come and go
    steps = np.array(rates.decode_step_s[8:40]) / np.array(TRUE.rates.decode_step_s[8:40])
    assert steps.mean() == pytest.approx(1.0, abs=0.15)
    assert rates.decode_slowdown == pytest.approx(1.5, abs=0.25)


def test_another_configuration_is_predicted(recorded):
    found = read_measurements(recorded)
    for changes in ({}, {"max_staleness": 0}, {"groups_per_step": 8}):
        predicted = figures_of(Simulation(scenario_of(replace(CONFIG, **changes), found, 40)).run(), 0.0)
        truth = figures_of(Simulation(replace(TRUE, **changes)).run(), 0.0)
        assert predicted.step_s == pytest.approx(truth.step_s, rel=0.1), changes


def test_reading_a_long_run_takes_seconds(recorded):
    started_s = time.monotonic()
    read_measurements(recorded)
    assert time.monotonic() - started_s < 20


def test_runs_too_short_or_of_an_older_version_are_refused(recorded, tmp_path):
    with pytest.raises(ConfigError, match="3 steps are too few"):
        read_measurements(recorded, last=3)
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / name).write_text((recorded / name).read_text())
    lines = [json.loads(line) for line in (recorded / "timeline.jsonl").read_text().splitlines()]
    old = [{key: value for key, value in line.items() if key != "tokens"} for line in lines]
    (tmp_path / "timeline.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    with pytest.raises(ConfigError, match="does not say how long completions were"):
        read_measurements(tmp_path)
    assert configuration.load("grpo", str(tmp_path / "config.yaml")) == CONFIG
