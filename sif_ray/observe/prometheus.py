"""The latest scalars of a run at Ray's own metrics endpoint, for Prometheus and Grafana.

Ray exports them at `http://<node>:<metrics export port>/metrics` of the driver's node, a few seconds late, and lists
the endpoints of a cluster in `<session folder>/../prom_metrics_service_discovery.json`; Ray puts `ray_` before a name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge, Histogram

STALENESS_EDGES = (0.5, 1.5, 2.5, 3.5, 4.5, 8.5, 16.5, 32.5)
SUMMED = {"sync_bytes": "sif_ray_synced_bytes"}  # values of a step that are also worth a sum over the run


class Prometheus:
    """`reward/box` is the gauge `sif_ray_reward{of="box"}`, `entropy` the gauge `sif_ray_entropy`; the
    shares `staleness/0`, `staleness/1`, ... add 100 observations a step to the histogram `sif_ray_staleness`; counters
    are `sif_ray_steps` and those of `SUMMED`. Every series has the label `run`.

    Needs a running Ray from the first `log` on.
    """

    name = "prometheus"

    def __init__(self, run: str) -> None:
        self._labels = {"run": run}
        self._gauges: dict[str, Gauge] = {}
        self._last_step: int | None = None
        self._steps = Counter("sif_ray_steps", "optimiser steps", ("run",))
        self._sums = {name: Counter(metric, f"sum of {name}", ("run",)) for name, metric in SUMMED.items()}
        self._staleness = Histogram(
            "sif_ray_staleness", "policy versions behind the learner", list(STALENESS_EDGES), ("run",)
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        again = step == self._last_step  # with the values of an evaluation; what adds up is counted already
        self._last_step = step
        if not again:
            self._steps.inc(1, self._labels)
        for name, value in values.items():
            family, _, of = name.partition("/")
            if family == "staleness" and of.isdigit():
                for _ in range(0 if again else round(100 * value)):
                    self._staleness.observe(float(of), self._labels)
            elif math.isfinite(value):
                self._gauge(family).set(value, self._labels | {"of": of})
                if name in self._sums and value > 0 and not again:
                    self._sums[name].inc(value, self._labels)

    def close(self, ok: bool) -> None:
        """Nothing to do: the series end with the driver."""

    def _gauge(self, family: str) -> Gauge:
        if family not in self._gauges:
            self._gauges[family] = Gauge(f"sif_ray_{family}", f"{family} of the last step", ("run", "of"))
        return self._gauges[family]
