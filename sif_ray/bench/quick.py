"""The suite `quick`: small loads of the suites that offer one, each against loose bounds of its ratios, in two to three
minutes on two cores. It guards against regressions: a bound that is broken fails the job. Rates are for the suites
themselves.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

from sif_ray.bench.findings import Findings, Goal

log = logging.getLogger(__name__)


def measure(repetitions: int) -> Findings:
    """What `quick() -> Findings` of every suite that has it finds, all `repetitions` times."""
    from sif_ray.bench import SUITES, suite_module

    goals: list[Goal] = []
    figures: dict[str, Any] = {}
    for suite in SUITES:
        quick = getattr(suite_module(suite), "quick", None)
        if quick is None:
            continue
        for turn in range(1, repetitions + 1):
            started_s = time.perf_counter()
            found: Findings = quick()
            log.info("bench quick: %s took %.0f s", suite, time.perf_counter() - started_s)
            name = suite if repetitions == 1 else f"{suite} {turn}"
            goals += [replace(goal, name=f"{name}: {goal.name}") for goal in found.goals]
            figures[name] = found.figures
    return Findings(goals, figures)
