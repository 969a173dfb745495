"""The scaling of a sweep as an SVG that stands alone: completions per second over GPUs, both logarithmic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from sif_ray.observe.charts import percent, short
from sif_ray.plan.figures import Figures

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 76, 24, 46, 56
BLUE, RED, GREY = "#2563a8", "#c2410c", "#8a8a8a"


def scaling_svg(pairs: Sequence[tuple[Figures, Figures | None]]) -> str:
    """Simulated runs without and, where there are any, with failures, and what the smallest one would give in
    proportion."""
    sizes = [one.gpus for one, _ in pairs]
    plain = [one.completions_per_s for one, _ in pairs]
    failing = [other.completions_per_s for _, other in pairs if other is not None]
    ideal = [plain[0] * size / sizes[0] for size in sizes]
    low = 10 ** math.floor(math.log10(min([*plain, *failing])))
    high = max(10 ** math.ceil(math.log10(max([*plain, *ideal]))), 10 * low)

    def x(gpus: float) -> float:
        span = percent(math.log(gpus), math.log(sizes[0]), math.log(max(sizes[-1], 2 * sizes[0])))
        return LEFT + span / 100 * (WIDTH - LEFT - RIGHT)

    def y(rate: float) -> float:
        return HEIGHT - BOTTOM - percent(math.log(rate), math.log(low), math.log(high)) / 100 * (HEIGHT - TOP - BOTTOM)

    lines = [
        _line(sizes, ideal, x, y, GREY, dashes="3 4", dots=False),
        _line(sizes, plain, x, y, BLUE),
        _line(sizes[: len(failing)], failing, x, y, RED, dashes="7 5") if failing else "",
    ]
    legend = [(GREY, "in proportion to the smallest"), (BLUE, "without failures")]
    legend += [(RED, "with failures")] if failing else []
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            'font-family="system-ui, sans-serif" font-size="13" fill="#222">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
            *_grid(sizes, low, high, x, y),
            *lines,
            *_legend(legend),
            f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 12}" text-anchor="middle">GPUs</text>',
            f'<text x="{LEFT}" y="18" font-weight="600">Trained completions per second, simulated</text>',
            "</svg>\n",
        ]
    )


def _grid(
    sizes: Sequence[int], low: float, high: float, x: Callable[[float], float], y: Callable[[float], float]
) -> list[str]:
    marks = []
    for size in sizes:
        at = x(size)
        marks.append(f'<path d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#e4e4e4"/>')
        marks.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{size:,}</text>')
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        at = y(10.0**power)
        marks.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="#e4e4e4"/>')
        marks.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{short(10.0**power)}</text>')
    return marks


def _line(
    sizes: Sequence[int],
    rates: Sequence[float],
    x: Callable[[float], float],
    y: Callable[[float], float],
    colour: str,
    dashes: str = "none",
    dots: bool = True,
) -> str:
    points = [(x(size), y(rate)) for size, rate in zip(sizes, rates, strict=True)]
    path = "M" + "L".join(f"{across:.1f} {down:.1f}" for across, down in points)
    circles = "".join(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="4" fill="{colour}"/>' for across, down in points)
    stroke = f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"/>'
    return stroke + (circles if dots else "")


def _legend(entries: Sequence[tuple[str, str]]) -> list[str]:
    return [
        f'<path d="M{LEFT + 14} {TOP + 16 + 20 * row}h26" stroke="{colour}" stroke-width="3"/>'
        f'<text x="{LEFT + 48}" y="{TOP + 20 + 20 * row}">{text}</text>'
        for row, (colour, text) in enumerate(entries)
    ]
