"""The job `chaos strike`: scenarios of `sif_ray.chaos.scenarios` on this machine, as often as wanted."""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
from pathlib import Path
from typing import Any

from sif_ray.chaos.scenarios import SCENARIOS, Scenario, possible, run_scenario
from sif_ray.config import ConfigError
from sif_ray.observe.progress import Progress
from sif_ray.observe.run_folder import write_json

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sif-ray chaos strike`."""
    told = "\n".join(f"  {scenario.name:<28} {scenario.promise}" for scenario in SCENARIOS)
    parser.description = f"{parser.description}\n\nscenarios, and what is promised:\n{told}"
    parser.add_argument("scenarios", metavar="SCENARIO", nargs="*", help="which (default: all)")
    parser.add_argument("--times", metavar="N", type=int, default=1, help="how often each (default: 1)")
    parser.add_argument("--json", metavar="OUT", type=Path, help="file for what came of them")


def run(options: argparse.Namespace) -> int:
    """Strike. Returns 1 when a promise was broken."""
    known = {scenario.name: scenario for scenario in SCENARIOS}
    unknown = [name for name in options.scenarios if name not in known]
    if unknown:
        raise ConfigError(f"there is no scenario {unknown[0]!r}; there are: {', '.join(known)}")
    chosen = [known[name] for name in options.scenarios] or SCENARIOS
    results = []
    with Progress("strikes", total=len(chosen) * options.times, unit="runs") as progress:
        for scenario in chosen:
            if possible(scenario):
                results.append(_result(scenario, options.times, progress))
            else:
                log.warning("%s is not tried: it makes a disk of its own, which only root may", scenario.name)
            if options.json and results:
                write_json(options.json, {"ok": all(not one["broken"] for one in results), "scenarios": results})
    return int(any(one["broken"] for one in results))


def _result(scenario: Scenario, times: int, progress: Progress) -> dict[str, Any]:
    seconds, broken = [], []
    for _ in range(times):
        with tempfile.TemporaryDirectory(prefix="sif_ray-chaos-") as name:
            try:
                seconds.append(run_scenario(scenario, Path(name) / scenario.name))
            except Exception as error:  # the other scenarios are tried all the same, and it counts as broken
                log.exception("%s", scenario.name)
                broken.append(f"{type(error).__name__}: {error}")
        progress.advance(scenario=scenario.name, broken=float(len(broken)))
    if seconds:
        log.info("%s: kept %d of %d times, %.0f s to the end", scenario.name, len(seconds), times, max(seconds))
    return {
        "name": scenario.name,
        "promise": scenario.promise,
        "kept": len(seconds),
        "broken": broken,
        "seconds_median": statistics.median(seconds) if seconds else None,
        "seconds_max": max(seconds, default=None),
    }
