"""Measurements of parts of the system on the machine at hand: `sif-ray bench SUITE --json OUT`.

A suite is a module with `measure(repetitions) -> Findings`; `SUITES` names it. One that also has `quick() -> Findings`,
a small load against loose bounds, takes part in `quick`.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import time
from pathlib import Path

from sif_ray.bench.findings import Findings

log = logging.getLogger(__name__)

GUARD = "quick"  # the suite whose missed goals fail the job
SUITES = {
    "cost": "sif_ray.bench.cost",
    "datagen": "sif_ray.bench.datagen",
    "gpu": "sif_ray.bench.gpu",
    "grpo": "sif_ray.bench.grpo",
    "learner": "sif_ray.bench.learner",
    "overlap": "sif_ray.bench.overlap",
    "quick": "sif_ray.bench.quick",
    "reward": "sif_ray.bench.reward",
    "rollout": "sif_ray.bench.rollout",
    "serve": "sif_ray.bench.serve",
    "startup": "sif_ray.bench.startup",
    "sync": "sif_ray.bench.sync",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sif-ray bench`."""
    parser.add_argument("suite", metavar="SUITE", choices=SUITES, help=f"what to measure: {', '.join(SUITES)}")
    parser.add_argument("--json", metavar="OUT", type=Path, help="file for goals, figures and the machine")
    parser.add_argument("--repetitions", metavar="N", type=int, help="of every measurement (default: 3; quick: 1)")


def run(options: argparse.Namespace) -> int:
    """Measure, tell, and write `options.json`. A goal that is missed is a finding, and no failure of the job, but for
    `GUARD`. Returns the exit status."""
    started_s = time.time()
    repetitions = options.repetitions or (1 if options.suite == GUARD else 3)
    findings: Findings = importlib.import_module(SUITES[options.suite]).measure(repetitions)
    for goal in findings.goals:
        log.info("bench %s: %s", options.suite, goal.told())
    if options.json:
        findings.write(options.json, options.suite, time.time() - started_s)
        log.info("bench %s: figures in %s", options.suite, options.json)
    return int(options.suite == GUARD and not all(goal.ok for goal in findings.goals))
