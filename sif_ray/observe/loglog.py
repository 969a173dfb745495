"""Curves in a figure with both axes logarithmic, as an SVG that stands alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sif_ray.observe.charts import percent, short

WIDTH, HEIGHT = 640, 420  # without the legend, which is to the right
LEFT, RIGHT, TOP, BOTTOM = 76, 24, 46, 56
CHARACTER, KEY = 7.4, 40  # widths in the legend: a character at most, and a line with its gap
MARK_DISTANCE = 30  # between two sizes that are written
COLOURS = ("#2563a8", "#c2410c", "#15803d", "#7e22ce", "#0e7490", "#a16207", "#be185d", "#4d7c0f", "#1e3a8a", "#9f1239")
GREY = "#8a8a8a"


@dataclass(frozen=True)
class Curve:
    """Positive values over ascending positive sizes."""

    name: str
    sizes: Sequence[float]
    values: Sequence[float]
    colour: str
    dashes: str = "none"
    dots: bool = True


def loglog_svg(title: str, axis: str, curves: Sequence[Curve]) -> str:
    """The curves, later ones above earlier ones, over all their sizes."""
    marks = sorted({size for curve in curves for size in curve.sizes})
    values = [value for curve in curves for value in curve.values]
    low = 10 ** math.floor(math.log10(min(values)))
    high = max(10 ** math.ceil(math.log10(max(values))), 10 * low)

    def x(size: float) -> float:
        span = percent(math.log(size), math.log(marks[0]), math.log(max(marks[-1], 2 * marks[0])))
        return LEFT + span / 100 * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - percent(math.log(value), math.log(low), math.log(high)) / 100 * (HEIGHT - TOP - BOTTOM)

    width = WIDTH + KEY + round(CHARACTER * max(len(curve.name) for curve in curves))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" '
            'font-family="system-ui, sans-serif" font-size="13" fill="#222">',
            f'<rect width="{width}" height="{HEIGHT}" fill="#fff"/>',
            *_grid(marks, low, high, x, y),
            *(_line(curve, x, y) for curve in curves),
            *_legend(curves),
            f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 12}" text-anchor="middle">{axis}</text>',
            f'<text x="{LEFT}" y="18" font-weight="600">{title}</text>',
            "</svg>\n",
        ]
    )


def _grid(
    sizes: Sequence[float], low: float, high: float, x: Callable[[float], float], y: Callable[[float], float]
) -> list[str]:
    marks = []
    written = -math.inf
    for size in sizes:
        at = x(size)
        marks.append(f'<path d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#e4e4e4"/>')
        if at >= written + MARK_DISTANCE:
            written = at
            marks.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{short(size)}</text>')
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        at = y(10.0**power)
        marks.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="#e4e4e4"/>')
        marks.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{short(10.0**power)}</text>')
    return marks


def _line(curve: Curve, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    points = [(x(size), y(value)) for size, value in zip(curve.sizes, curve.values, strict=True)]
    path = "M" + "L".join(f"{across:.1f} {down:.1f}" for across, down in points)
    circles = "".join(
        f'<circle cx="{across:.1f}" cy="{down:.1f}" r="4" fill="{curve.colour}"/>' for across, down in points
    )
    stroke = (
        f'<path d="{path}" fill="none" stroke="{curve.colour}" stroke-width="2" stroke-dasharray="{curve.dashes}"/>'
    )
    return stroke + (circles if curve.dots else "")


def _legend(curves: Sequence[Curve]) -> list[str]:
    return [
        f'<path d="M{WIDTH} {TOP + 16 + 20 * row}h26" stroke="{curve.colour}" stroke-width="3"/>'
        f'<text x="{WIDTH + KEY - 6}" y="{TOP + 20 + 20 * row}">{curve.name}</text>'
        for row, curve in enumerate(curves)
    ]
