"""What a suite found: goals that are met or missed, the figures behind them, and the machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sif_ray.observe.run_folder import environment, write_json

T = TypeVar("T")


@dataclass(frozen=True)
class Goal:
    """A figure and its bound. Example: `Goal("peak memory, GiB", 1.9, 3.7, at_least=False).ok` is true."""

    name: str
    value: float
    goal: float
    at_least: bool  # the value must be `goal` or more; otherwise `goal` or less

    @property
    def ok(self) -> bool:
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def told(self) -> str:
        """One line for people."""
        bound = "at least" if self.at_least else "at most"
        return f"{self.name}: {self.value:.3g}, {bound} {self.goal:.3g} wanted{'' if self.ok else ' -- MISSED'}"


@dataclass(frozen=True)
class Findings:
    """All that a suite measured. `figures` are JSON values."""

    goals: list[Goal]
    figures: dict[str, Any]
    svg: str = ""  # a figure of them; "" = none

    def write(self, path: Path, suite: str, seconds: float) -> None:
        """Write {"suite", "ok", "goals": [{"name", "value", "goal", "ok"}], "figures", "environment", "seconds"}, and
        the SVG beside it."""
        goals = [{"name": goal.name, "value": goal.value, "goal": goal.goal, "ok": goal.ok} for goal in self.goals]
        ok = all(goal.ok for goal in self.goals)
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {"suite": suite, "ok": ok, "goals": goals, "figures": self.figures, "environment": environment()}
        write_json(path, {**found, "seconds": round(seconds, 1)})
        if self.svg:
            path.with_suffix(".svg").write_text(self.svg, encoding="utf-8")


def interleaved(works: Mapping[str, Callable[[], T]], repetitions: int) -> dict[str, list[T]]:
    """The results of every work, done in turns: what changes on the machine meanwhile meets all of them."""
    results: dict[str, list[T]] = {name: [] for name in works}
    for _ in range(repetitions):
        for name, work in works.items():
            results[name].append(work())
    return results


def spread(values: Sequence[float]) -> dict[str, Any]:
    """{"median", "min", "max", "values"}."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": list(values)}


def share(values: Sequence[float], others: Sequence[float]) -> float:
    """The values in proportion to the others: the median over turns, in each of which both met the same machine."""
    return statistics.median(value / other for value, other in zip(values, others, strict=True))
