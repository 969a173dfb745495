"""Measurements of parts of the system on the machine at hand: `sif-ray bench SUITE --json OUT`.

A suite is the module of its name, with `measure(repetitions) -> Findings`; `SUITES` says what it is. One that also has
`quick() -> Findings`, a small load against loose bounds, takes part in `quick`.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import time
from pathlib import Path
from types import ModuleType

from sif_ray.bench.findings import Findings

log = logging.getLogger(__name__)

GUARD = "quick"  # the suite whose missed goals fail the job
SUITES = {
    "cost": "how the cost of a run's parts grows with its sizes",
    "datagen": "rows of data generation, beside the published script's way",
    "gpu": "learner, engine and weight update with a 3B policy on one GPU",
    "grpo": "whole GRPO steps, beside TRL's trainer and what the stages alone allow",
    "learner": "trained tokens, beside a bare PyTorch loop; padding; memory of log-probs",
    "overlap": "the asynchronous loop, beside the same loop on-policy",
    "quick": "small loads of the others against loose bounds; one that is broken fails the job",
    "reward": "traces scored on a core; transitions of the ledger",
    "rollout": "tokens of rollout actors, beside vLLM's LLM.generate",
    "serve": "the HTTP endpoint, beside its engine",
    "startup": "the start of a run up to its first trained step",
    "sync": "weight updates by size, beside a copy of as many bytes",
}


def suite_module(name: str) -> ModuleType:
    """The module of a suite, imported only now."""
    return importlib.import_module(f"{__name__}.{name}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sif-ray bench`."""
    parser.description = f"{parser.description}\n\nsuites:\n" + "\n".join(
        f"  {n:<10} {told}" for n, told in SUITES.items()
    )
    parser.add_argument("suite", metavar="SUITE", choices=SUITES, help="what to measure")
    parser.add_argument("--json", metavar="OUT", type=Path, help="file for goals, figures and the machine")
    parser.add_argument("--repetitions", metavar="N", type=int, help="of every measurement (default: 3; quick: 1)")


def run(options: argparse.Namespace) -> int:
    """Measure, tell, and write `options.json`. A goal that is missed is a finding, and no failure of the job, but for
    `GUARD`. Returns the exit status."""
    started_s = time.time()
    repetitions = options.repetitions or (1 if options.suite == GUARD else 3)
    findings: Findings = suite_module(options.suite).measure(repetitions)
    for goal in findings.goals:
        log.info("bench %s: %s", options.suite, goal.told())
    if options.json:
        findings.write(options.json, options.suite, time.time() - started_s)
        log.info("bench %s: figures in %s", options.suite, options.json)
    return int(options.suite == GUARD and not all(goal.ok for goal in findings.goals))
