"""The suite `quick`: it takes the suites that offer a small load, and fails the job when a bound is broken."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest

from sif_ray import bench
from sif_ray.bench.findings import Findings, Goal
from sif_ray.cli import run_job


@pytest.fixture
def suites(monkeypatch):
    """Two suites, of which one offers a small load; what that finds is set by the test."""
    found = {}
    offering, other = ModuleType("offering"), ModuleType("other")
    offering.quick = lambda: Findings([Goal("share", found["share"], 0.5, at_least=True)], found)
    for module in (offering, other):
        monkeypatch.setitem(sys.modules, f"sif_ray.bench.{module.__name__}", module)
        monkeypatch.setitem(bench.SUITES, module.__name__, "")
    for name in set(bench.SUITES) - {"offering", "other", "quick"}:
        monkeypatch.delitem(bench.SUITES, name)
    return found


@pytest.mark.parametrize(("share", "status"), [(0.6, 0), (0.4, 1)])
def test_a_broken_bound_fails_the_job(suites, tmp_path, share, status):
    suites["share"] = share
    assert run_job("bench", ["quick", "--json", str(tmp_path / "quick.json")]) == status
    written = json.loads((tmp_path / "quick.json").read_text())
    assert written["goals"] == [{"name": "offering: share", "value": share, "goal": 0.5, "ok": status == 0}]
    assert written["figures"] == {"offering": {"share": share}}
