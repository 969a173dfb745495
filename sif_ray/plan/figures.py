"""The figures that a plan is about, from a simulated run."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from sif_ray.plan.simulation import Outcome


@dataclass(frozen=True)
class Figures:
    """Of one simulated run. Shares lie in [0, 1]; rates count what was trained, not what was written."""

    gpus: int
    learner_ranks: int
    num_engines: int
    max_staleness: int
    groups_per_step: int
    step_s: float  # median
    step_p95_s: float
    settled_step_s: float  # mean, without the first steps, which find the window empty
    mean_step_s: float  # the whole run, failures included
    steps_per_h: float
    completions_per_s: float
    tokens_per_s: float
    learner_busy: float
    learner_trains: float
    learner_waits: float
    engines_busy: float
    scorers_busy: float
    judge_busy: float
    staleness: dict[int, float]  # share of the trained groups by versions behind
    lost_share: float  # of the tokens written: never trained, or trained in a step that was undone
    engine_deaths: int
    learner_deaths: int
    steps_undone: int
    tickets_dropped: int
    gpu_hours_per_1000: float  # of training steps
    usd_per_1000: float
    bottleneck: str

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "staleness": {str(age): share for age, share in self.staleness.items()}}


def figures_of(outcome: Outcome, usd_per_hour: float) -> Figures:
    """The figures of a run of at least one step; `usd_per_hour` of one GPU."""
    scenario, steps = outcome.scenario, outcome.steps
    settled = steps[min(scenario.max_staleness + 1, len(steps) - 1) :]
    seconds = [step.seconds for step in settled]
    mean_s = outcome.seconds / len(steps)
    ages = sum((step.staleness for step in steps), Counter[int]())
    groups = sum(ages.values())
    tokens = sum(step.tokens for step in steps)
    gpu_hours = mean_s * 1000 * scenario.num_gpus / 3600
    return Figures(
        gpus=scenario.num_gpus,
        learner_ranks=scenario.learner_ranks,
        num_engines=scenario.num_engines,
        max_staleness=scenario.max_staleness,
        groups_per_step=scenario.groups_per_step,
        step_s=statistics.median(seconds),
        step_p95_s=float(np.percentile(seconds, 95)),
        settled_step_s=statistics.mean(seconds),
        mean_step_s=mean_s,
        steps_per_h=3600 / mean_s,
        completions_per_s=groups * scenario.group_size / outcome.seconds,
        tokens_per_s=tokens / outcome.seconds,
        learner_busy=outcome.learner_busy,
        learner_trains=outcome.learner_trains,
        learner_waits=outcome.learner_waits,
        engines_busy=outcome.engines_busy,
        scorers_busy=outcome.scorers_busy,
        judge_busy=outcome.judge_busy,
        staleness={age: count / groups for age, count in sorted(ages.items())},
        lost_share=max(0.0, 1 - tokens / outcome.tokens_written),
        engine_deaths=outcome.engine_deaths,
        learner_deaths=outcome.learner_deaths,
        steps_undone=outcome.steps_undone,
        tickets_dropped=outcome.tickets["dropped"],
        gpu_hours_per_1000=gpu_hours,
        usd_per_1000=gpu_hours * usd_per_hour,
        bottleneck=_bottleneck(outcome),
    )


def _bottleneck(outcome: Outcome) -> str:
    """Who the others wait for most."""
    others = 1 - outcome.learner_trains - outcome.learner_waits
    if outcome.learner_trains >= max(others, outcome.learner_waits):
        return "learner"
    if others > outcome.learner_waits:
        return "weight sync"
    return "judge" if outcome.judge_busy > 0.8 else "engines"
