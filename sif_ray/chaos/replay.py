"""The job `chaos replay`: a simulated run once more, event by event as before, with all that the loop says."""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sif-ray chaos replay`."""
    parser.add_argument("seed", metavar="SEED", type=int, help="as `sif-ray chaos simulate` tells it")


def run(options: argparse.Namespace) -> int:
    """Replay. Returns 1 when a promise was broken."""
    from sif_ray.chaos.simulation import simulate  # imports all that a run consists of

    outcome = simulate(options.seed)
    for name, value in asdict(outcome).items():
        log.info("%s: %s", name, value)
    return int(bool(outcome.violation))
