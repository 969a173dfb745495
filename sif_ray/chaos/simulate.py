"""The job `chaos simulate`: run the control plane on virtual time, a run for every seed."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sif_ray.observe.progress import Progress
from sif_ray.observe.run_folder import write_json

if TYPE_CHECKING:
    from sif_ray.chaos.simulation import Outcome

log = logging.getLogger(__name__)

SHOWN = 10  # broken seeds that are told one by one
CHUNK = 10  # seeds that a worker takes at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sif-ray chaos simulate`."""
    parser.add_argument("--seeds", metavar="N", type=int, default=1000, help="how many (default: 1000)")
    parser.add_argument("--first", metavar="SEED", type=int, default=0, help="the first one (default: 0)")
    parser.add_argument("--workers", metavar="N", type=int, default=os.cpu_count(), help="processes (default: CPUs)")
    parser.add_argument("--json", metavar="OUT", type=Path, help="file for the figures and the seeds that failed")


def run(options: argparse.Namespace) -> int:
    """Simulate. Returns 1 when a promise was broken."""
    started_s = time.monotonic()
    outcomes = simulate_all(range(options.first, options.first + options.seeds), options.workers)
    figures = summary(outcomes) | {"seconds": round(time.monotonic() - started_s, 1), "workers": options.workers}
    broken = [outcome for outcome in outcomes if outcome.violation]
    for outcome in broken[:SHOWN]:
        log.error("seed %d: %s", outcome.seed, outcome.violation)
    log.info("chaos simulate: %s", figures)
    if options.json:
        write_json(options.json, figures | {"broken": [asdict(outcome) for outcome in broken]})
    if broken:
        log.error(
            "%d of %d seeds broke a promise; see one with `sif-ray chaos replay SEED`", len(broken), len(outcomes)
        )
    return int(bool(broken))


def simulate_all(seeds: Sequence[int], num_workers: int) -> list[Outcome]:
    """The outcome of every seed, in order, computed in so many processes."""
    with (
        multiprocessing.get_context("spawn").Pool(num_workers, initializer=_prepare) as pool,
        Progress("simulation", total=len(seeds), unit="seeds") as progress,
    ):
        return list(_counted(pool.imap(_simulate, seeds, CHUNK), progress))


def _counted(outcomes: Iterator[Outcome], progress: Progress) -> Iterator[Outcome]:
    broken = 0
    for outcome in outcomes:
        broken += bool(outcome.violation)
        progress.advance(broken=broken)
        yield outcome


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Totals over seeds: {"seeds": 1000, "broken": 0, "faults": {"lost": 3012, ...}, "lives": {"killed": 711, ...}}."""
    faults: Counter[str] = Counter()
    lives: Counter[str] = Counter()
    for outcome in outcomes:
        faults.update(outcome.faults)
        lives.update(outcome.lives)
    return {
        "seeds": len(outcomes),
        "broken": sum(bool(outcome.violation) for outcome in outcomes),
        "events": sum(outcome.events for outcome in outcomes),
        "virtual_hours": round(sum(outcome.virtual_s for outcome in outcomes) / 3600, 1),
        "most_tasks": max((outcome.most_tasks for outcome in outcomes), default=0),
        "faults": dict(sorted(faults.items())),
        "lives": dict(sorted(lives.items())),
    }


def _prepare() -> None:
    from sif_ray.chaos.simulation import quiet

    quiet()


def _simulate(seed: int) -> Outcome:
    from sif_ray.chaos.simulation import simulate

    return simulate(seed)
