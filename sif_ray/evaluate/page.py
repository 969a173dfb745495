"""An evaluation as one HTML page: scores of all policies with intervals, what they differ in, and the worst items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sif_ray.evaluate.benchmarks import BENCHMARKS
from sif_ray.evaluate.measure import CONVENTIONS, OVERALL
from sif_ray.evaluate.metrics import TERMS
from sif_ray.evaluate.reference import references
from sif_ray.evaluate.worst import WorstItem
from sif_ray.observe.page import templates

PAGE = "evaluation.html"


@dataclass(frozen=True)
class Cell:
    """A score: `low`, `at` and `high` in per cent of its axis."""

    words: str
    interval: str
    low: float
    at: float
    high: float


@dataclass(frozen=True)
class Change:
    """A difference of two scores, and whether its interval leaves zero out."""

    words: str
    interval: str
    verdict: str  # "better", "worse" or "same"
    p: str = ""


def cell(found: Mapping[str, Any] | None, scale: float = 1.0) -> Cell | None:
    """{"score", "ci95"} for people; None where nothing counts."""
    if found is None or found["score"] is None:
        return None
    low, high = found["ci95"] or (found["score"], found["score"])
    at, low_at, high_at = (min(max(100 * value / scale, 0.0), 100.0) for value in (found["score"], low, high))
    return Cell(f"{found['score']:.3f}", f"{low:.3f} … {high:.3f}", low_at, at, high_at)


def change(found: Mapping[str, Any], mcnemar: Mapping[str, Any] | None = None) -> Change | None:
    """{"difference", "ci95"} for people; None without a difference."""
    if found["difference"] is None or not found["ci95"]:
        return None
    low, high = found["ci95"]
    verdict = "better" if low > 0 else "worse" if high < 0 else "same"
    p = f"p = {mcnemar['p']:.2g}" if mcnemar else ""
    return Change(f"{found['difference']:+.3f}", f"{low:+.3f} … {high:+.3f}", verdict, p)


def render(
    results: Mapping[str, Any],
    worst: Mapping[str, Sequence[WorstItem]],
    *,
    is_toy: bool,
) -> str:
    """The page of results.json; `worst` has the items to draw by task."""
    template = templates("sif_ray.evaluate").get_template("evaluation.html.jinja")
    return template.render(
        title=_title(results),
        is_toy=is_toy,
        results=results,
        policies=results["policies"],
        overview=[_overview(name, found) for name, found in results["benchmarks"].items()],
        benchmarks={name: _tables(found) for name, found in results["benchmarks"].items()},
        heldout=_heldout(results) if "checkpoints" in results else None,
        references={name: references(found["benchmark"]) for name, found in results["benchmarks"].items()},
        summaries={name: BENCHMARKS[found["benchmark"]] for name, found in results["benchmarks"].items()},
        worst=worst,
        conventions=CONVENTIONS,
    )


def _title(results: Mapping[str, Any]) -> str:
    tasks = len(results["benchmarks"]) + ("checkpoints" in results)
    policies = len(results["policies"])
    return f"{policies} polic{'y' if policies == 1 else 'ies'} on {tasks} task{'' if tasks == 1 else 's'}"


def _overview(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    greedy = {policy: arms["greedy"][0] for policy, arms in found["policies"].items()}
    measured = next(iter(greedy.values()))
    scale = max(_largest(result, measured["metric"]) for result in greedy.values())
    differences = {}
    for policy, pair in found["paired"].items():
        strict = pair["strict"]
        differences[policy] = change(strict[measured["metric"]][OVERALL], strict["mcnemar"])
    return {
        "name": name,
        "metric": measured["metric"],
        "n": measured["n"],
        "cells": {
            policy: {convention: cell(result[convention], scale) for convention in CONVENTIONS}
            for policy, result in greedy.items()
        },
        "changes": differences,
    }


def _tables(found: Mapping[str, Any]) -> dict[str, Any]:
    """The categories of every measure, the replies that could not be read, and the spread over draws."""
    greedy = {policy: arms["greedy"][0] for policy, arms in found["policies"].items()}
    first = next(iter(greedy.values()))
    tables = []
    for measure, groups in first["strict"]["tables"].items():
        scale = max(_largest(result, measure) for result in greedy.values())
        rows = {
            group: {
                policy: {c: cell(result[c]["tables"][measure].get(group), scale) for c in CONVENTIONS}
                for policy, result in greedy.items()
            }
            for group in groups
        }
        tables.append({"measure": measure, "rows": rows, "n": {group: groups[group]["n"] for group in groups}})
    return {
        "tables": tables,
        "unread": {policy: result["parse_failures"] for policy, result in greedy.items()},
        "refused": {policy: result["refused"] for policy, result in greedy.items() if result["refused"]},
        "unjudged": {policy: result["unjudged"] for policy, result in greedy.items() if result["unjudged"]},
        "judge": first["judge"],
        "draws": _draws(found["policies"]),
    }


def _draws(policies: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Mean and range of the strict score over the draws of every sampled arm."""
    rows = []
    for policy, arms in policies.items():
        for arm, draws in arms.items():
            scores = [result["strict"]["score"] for result in draws if result["strict"]["score"] is not None]
            if arm != "greedy" and scores:
                mean = sum(scores) / len(scores)
                rows.append(
                    {
                        "policy": policy,
                        "arm": arm,
                        "mean": f"{mean:.3f}",
                        "range": f"{min(scores):.3f} … {max(scores):.3f}",
                        "n": len(scores),
                    }
                )
    return rows


def _largest(result: Mapping[str, Any], measure: str) -> float:
    """What the right end of an axis is: 1 for shares, else the next hundred (MME counts up to 2800)."""
    scores = [
        found["score"] or 0.0 for convention in CONVENTIONS for found in result[convention]["tables"][measure].values()
    ]
    return 1.0 if max(scores) <= 1.0 else 100.0 * (max(scores) // 100 + 1)


def _heldout(results: Mapping[str, Any]) -> dict[str, Any]:
    def mean(found: Mapping[str, Any]) -> Cell | None:
        return cell({"score": found["mean"], "ci95": found["ci95"]})

    checkpoints = results["checkpoints"]
    arms = list(next(iter(checkpoints.values()))["arms"])
    return {
        "arms": arms,
        "terms": [term for term in TERMS if term != "total"] + ["total"],
        "means": {
            arm: {
                term: {policy: mean(found["arms"][arm]["means"][term]) for policy, found in checkpoints.items()}
                for term in TERMS
            }
            for arm in arms
        },
        "changes": {
            arm: {term: change(pair) for term, pair in terms.items()} for arm, terms in results["paired"].items()
        },
        "types": {
            kind: {
                "chance": results["chance"][kind],
                "cells": {
                    policy: mean(found["arms"]["greedy"]["answer_by_type"][kind])
                    for policy, found in checkpoints.items()
                },
            }
            for kind in results["chance"]
        },
        "sight": {policy: found["sight"] for policy, found in checkpoints.items()},
        "comparison": results["comparison"],
        "refused": {policy: reasons for policy, reasons in results["refused"].items() if reasons},
        "num_items": results["num_items"],
        "num_scenes": results["num_scenes"],
    }
