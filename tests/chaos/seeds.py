"""Prints the outcomes of the seeds that it is given, up to the first that breaks a promise: a line of JSON for each.

A process of its own, as it may run another package than the tests do, or hash strings in another way.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from sif_ray.chaos.simulation import quiet, simulate

if __name__ == "__main__":
    quiet()
    for seed in map(int, sys.argv[1:]):
        outcome = simulate(seed)
        print(json.dumps(asdict(outcome)), flush=True)
        if outcome.violation:
            break
