"""What is logged stands at the metrics endpoint of a real Ray node."""

from __future__ import annotations

import time

import pytest
from ray_metrics import scrape

from sif_ray.observe.prometheus import Prometheus

EXPORTED_WITHIN_S = 60.0  # Ray collects every ten seconds or so


@pytest.fixture(scope="module")
def series(ray_local) -> dict[tuple[str, str], float]:
    """{(name, label of or le): value} of the run "test/prometheus" after two steps."""
    sink = Prometheus("test/prometheus")
    sink.log(1, {"reward/total": 1.0, "kl": 0.5, "sync_bytes": 100.0, "staleness/0": 0.75, "staleness/1": 0.25})
    sink.log(2, {"reward/total": 1.25, "reward/box": 0.5, "sync_bytes": 50.0, "staleness/2": 1.0, "kl": float("nan")})
    sink.log(2, {"eval/total": 2.0, "sync_bytes": 50.0, "staleness/2": 1.0})  # an evaluation of the same step
    sink.close(True)
    deadline_s = time.monotonic() + EXPORTED_WITHIN_S
    while time.monotonic() < deadline_s:
        found = of_the_run()
        if found.get(("ray_sif_ray_reward", "total")) == 1.25:
            return found
        time.sleep(1)
    pytest.fail(f"nothing was exported within {EXPORTED_WITHIN_S:g} s, but {sorted(found)}")


def of_the_run() -> dict[tuple[str, str], float]:
    return {
        (name, labels.get("of") or labels.get("le") or ""): value
        for name, labels, value in scrape()
        if labels.get("run") == "test/prometheus"
    }


def test_gauges_hold_the_last_finite_value(series):
    assert series["ray_sif_ray_reward", "total"] == 1.25
    assert series["ray_sif_ray_reward", "box"] == 0.5
    assert series["ray_sif_ray_kl", ""] == 0.5
    assert series["ray_sif_ray_eval", "total"] == 2.0
    assert series["ray_sif_ray_sync_bytes", ""] == 50.0


def test_counters_add_up(series):
    assert series["ray_sif_ray_steps_total", ""] == 2
    assert series["ray_sif_ray_synced_bytes_total", ""] == 150.0


def test_the_staleness_histogram_is_cumulative(series):
    buckets = [series["ray_sif_ray_staleness_bucket", edge] for edge in ("0.5", "1.5", "2.5", "+Inf")]
    assert buckets == [75, 100, 200, 200]
    assert series["ray_sif_ray_staleness_count", ""] == 200
