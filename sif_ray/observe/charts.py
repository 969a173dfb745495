"""Charts as numbers in per cent of their frame: the template draws them at any width with text of one size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from sif_ray.observe.timeline import Span, busy_share, merge_intervals


@dataclass(frozen=True)
class Tick:
    """A mark on an axis, `at` per cent from its start."""

    at: float
    label: str


@dataclass(frozen=True)
class Plot:
    """A line over steps: every value faint, their running mean bold. Paths live in a square of 100 by 100, y down."""

    title: str
    unit: str
    raw_path: str
    mean_path: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    last: str  # the running mean at the end
    hover: dict[str, Any]  # what the page needs to name the value under the pointer
    css_class: str = ""


def line_plot(
    title: str, unit: str, steps: Sequence[float], values: Sequence[float], css_class: str = "", from_zero: bool = False
) -> Plot:
    """A plot of at least one finite value per step. The running mean is over a twelfth of the steps."""
    means = running_mean(values, len(values) // 25)
    low, high = min(values), max(values)
    y_ticks = nice_ticks(min(low, 0.0) if from_zero else low, high, 4)
    bottom, top = min(y_ticks[0], low), max(y_ticks[-1], high)
    left, right = steps[0], max(steps[-1], steps[0] + 1)

    def path(series: Sequence[float]) -> str:
        points = zip(steps, series, strict=True)
        return "M" + "L".join(f"{percent(x, left, right):.2f} {100 - percent(y, bottom, top):.2f}" for x, y in points)

    return Plot(
        title=title,
        unit=unit,
        raw_path=path(values),
        mean_path=path(means),
        x_ticks=[Tick(percent(x, left, right), f"{x:g}") for x in nice_ticks(left, right, 4) if left <= x <= right],
        y_ticks=[Tick(percent(y, bottom, top), short(y)) for y in y_ticks],
        last=short(means[-1]),
        hover={
            "steps": list(steps),
            "values": [float(f"{value:.4g}") for value in values],
            "means": [float(f"{value:.4g}") for value in means],
            "bottom": bottom,
            "top": top,
            "unit": unit,
        },
        css_class=css_class,
    )


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """At every place the mean of the values at most `reach` places away, of fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    starts, ends = np.maximum(0, places - reach), np.minimum(len(values), places + reach + 1)
    return [float(mean) for mean in (sums[ends] - sums[starts]) / (ends - starts)]


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers whose first is at most `low` and whose last is at least `high`."""
    if high <= low:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.10g}") for index in range(first, last + 1)]


def percent(value: float, low: float, high: float) -> float:
    """Where `value` lies between `low` (0) and `high` (100)."""
    return 100 * (value - low) / (high - low)


def short(value: float) -> str:
    """A number in a few characters: `0.85`, `1,234`, `4e-06`."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# --- distributions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Histogram:
    """How values spread over bins of equal width, in per cent of all. Paths live in a square of 100 by 100, y down."""

    title: str
    unit: str
    path: str  # filled steps
    other_path: str  # outline of a second set of values on the same axes; "" = none
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    last: str  # the key figure beside the title


def histogram(
    title: str, unit: str, counts: npt.ArrayLike, x_ticks: list[Tick], last: str, other: npt.ArrayLike | None = None
) -> Histogram:
    """Bars of `counts`, one per bin, and the outline of `other`, which may have another total."""
    shares = _shares(counts)
    other_shares = [] if other is None else _shares(other)
    y_ticks = nice_ticks(0.0, max([*shares, *other_shares, 1.0]), 3)
    return Histogram(
        title,
        unit,
        path=_steps(shares, y_ticks[-1]),
        other_path=_steps(other_shares, y_ticks[-1]) if other_shares else "",
        x_ticks=x_ticks,
        y_ticks=[Tick(percent(share, 0.0, y_ticks[-1]), f"{share:g} %") for share in y_ticks],
        last=last,
    )


def _shares(counts: npt.ArrayLike) -> list[float]:
    values = np.asarray(counts, dtype=np.float64)
    shares: list[float] = (100 * values / max(values.sum(), 1.0)).tolist()
    return shares


def _steps(shares: Sequence[float], top: float) -> str:
    """The closed outline of bars side by side."""
    corners = "".join(
        f"V{100 - 100 * share / top:.2f}H{100 * (k + 1) / len(shares):.2f}" for k, share in enumerate(shares)
    )
    return f"M0 100{corners}V100Z"


# --- busy time -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lane:
    """One worker over the run. Paths of `kinds` are in seconds from the start of the timeline, one unit high."""

    name: str
    busy: str  # share of the run, e.g. "72 %"
    share_path: str  # busy share over the run, in a square of 100 by 100
    kinds: dict[str, str] = field(default_factory=dict)
    css_class: str = ""  # kind of most of its work


@dataclass(frozen=True)
class LaneChart:
    lanes: list[Lane]
    total_s: float
    start_s: float  # of the excerpt that is shown without scripts
    excerpt_s: float
    ticks: list[Tick]  # of the whole run
    excerpt_ticks: list[Tick]


def lane_chart(spans: Sequence[Span], excerpt_s: float = 30.0, bins: int = 120) -> LaneChart:
    """Busy shares over the whole run, and every span for a closer look at the middle of it."""
    start_s = min(span.start_s for span in spans)
    total_s = max(max(span.end_s for span in spans) - start_s, 1e-3)
    excerpt_s = min(excerpt_s, total_s)
    first_s = (total_s - excerpt_s) / 2
    lanes = [_lane(name, spans, start_s, total_s, bins) for name in sorted({span.lane for span in spans}, key=_rank)]
    return LaneChart(
        lanes,
        total_s,
        first_s,
        excerpt_s,
        ticks=[Tick(percent(at, 0, total_s), f"{at:g} s") for at in nice_ticks(0, total_s, 6) if at <= total_s],
        excerpt_ticks=[
            Tick(percent(at, first_s, first_s + excerpt_s), f"{at:g} s")
            for at in nice_ticks(first_s, first_s + excerpt_s, 6)
            if first_s <= at <= first_s + excerpt_s
        ],
    )


def _rank(lane: str) -> tuple[int, str]:
    order = ("engine", "reward", "learner", "sync")
    return next((place for place, name in enumerate(order) if lane.startswith(name)), len(order)), lane


def _lane(name: str, spans: Sequence[Span], start_s: float, total_s: float, bins: int) -> Lane:
    by_kind: dict[str, list[tuple[float, float]]] = {}
    for span in spans:
        if span.lane == name:
            by_kind.setdefault(span.kind, []).append((span.start_s - start_s, span.end_s - start_s))
    merged = {kind: merge_intervals(intervals) for kind, intervals in sorted(by_kind.items(), key=_wait_first)}
    work = {kind: intervals for kind, intervals in merged.items() if kind != "wait"}
    busy = merge_intervals(interval for intervals in work.values() for interval in intervals)
    seconds = {kind: sum(end - start for start, end in intervals) for kind, intervals in work.items()}
    shares = bin_shares(busy, total_s, bins)
    return Lane(
        name=name,
        busy=f"{100 * busy_share(spans, name, list(work)):.0f} %",
        share_path=_steps(shares, top=1.0),
        kinds={
            kind: "".join(f"M{start:.2f} 0H{max(end, start + 0.01):.2f}V1H{start:.2f}Z" for start, end in intervals)
            for kind, intervals in merged.items()
        },
        css_class=max(seconds, key=lambda kind: seconds[kind]) if seconds else "wait",
    )


def _wait_first(entry: tuple[str, list[tuple[float, float]]]) -> tuple[bool, str]:
    return entry[0] != "wait", entry[0]


def bin_shares(intervals: Sequence[tuple[float, float]], total_s: float, bins: int) -> list[float]:
    """Share of each of `bins` equal parts of [0, total_s] that the disjoint, ascending `intervals` cover."""
    edges = np.linspace(0, total_s, bins + 1)
    # Covered seconds up to t grow linearly inside an interval and rest between them.
    times, covered = [0.0], [0.0]
    for start, end in intervals:
        times += [start, end]
        covered += [covered[-1], covered[-1] + end - start]
    return [float(share) for share in np.diff(np.interp(edges, times, covered)) / (total_s / bins)]


# --- intervals -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """A value with its interval on an axis, in per cent of the axis, and in words."""

    at: float
    low: float
    high: float
    words: str


def mark(mean: float, ci95: Sequence[float], low: float, high: float, signed: bool = False) -> Mark:
    """`mean` with `ci95` on the axis from `low` to `high`; what leaves the axis stops at its end."""
    clipped = [min(max(percent(value, low, high), 0.0), 100.0) for value in (mean, *ci95)]
    number = "{:+.3f}" if signed else "{:.3f}"
    words = f"{number.format(mean)} [{number.format(ci95[0])}, {number.format(ci95[1])}]"
    return Mark(clipped[0], clipped[1], clipped[2], words)
