"""Measurements of parts of the system on the machine at hand: `sif-ray bench SUITE --json OUT`.

A suite is a module with `measure(repetitions) -> Findings`; `SUITES` names it.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import time
from pathlib import Path

from sif_ray.bench.findings import Findings

log = logging.getLogger(__name__)

SUITES = {
    "datagen": "sif_ray.bench.datagen",
    "grpo": "sif_ray.bench.grpo",
    "overlap": "sif_ray.bench.overlap",
    "serve": "sif_ray.bench.serve",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sif-ray bench`."""
    parser.add_argument("suite", metavar="SUITE", choices=SUITES, help=f"what to measure: {', '.join(SUITES)}")
    parser.add_argument("--json", metavar="OUT", type=Path, help="file for goals, figures and the machine")
    parser.add_argument("--repetitions", metavar="N", type=int, default=3, help="of every measurement (default: 3)")


def run(options: argparse.Namespace) -> None:
    """Measure, tell, and write `options.json`. A goal that is missed is a finding, and no failure of the job."""
    started_s = time.time()
    findings: Findings = importlib.import_module(SUITES[options.suite]).measure(options.repetitions)
    for goal in findings.goals:
        log.info("bench %s: %s", options.suite, goal.told())
    if options.json:
        findings.write(options.json, options.suite, time.time() - started_s)
        log.info("bench %s: figures in %s", options.suite, options.json)
