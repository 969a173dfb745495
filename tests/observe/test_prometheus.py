"""What is logged stands at the metrics endpoint of a real Ray node."""

from __future__ import annotations

import re
import time
import urllib.request

import pytest

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
        found = scrape()
        if found.get(("ray_sif_ray_reward", "total")) == 1.25:
            return found
        time.sleep(1)
    pytest.fail(f"nothing was exported within {EXPORTED_WITHIN_S:g} s, but {sorted(found)}")


def scrape() -> dict[tuple[str, str], float]:
    import ray

    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as reply:
        text = reply.read().decode()
    found = {}
    for name, labels, value in re.findall(r"^(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        named = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if named.get("run") == "test/prometheus":
            found[name, named.get("of") or named.get("le") or ""] = float(value)
    return found


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
