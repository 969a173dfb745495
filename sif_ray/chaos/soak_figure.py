"""What a soak held of the machine over its time, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sif_ray.chaos.footprint import Footprint
from sif_ray.observe.charts import nice_ticks, percent, short
from sif_ray.observe.loglog import COLOURS

WIDTH, COLUMNS = 760, 2
PANEL_WIDTH, PANEL_HEIGHT, LEFT, TOP, GAP = 310, 110, 56, 66, 56
TITLES = {  # of the attributes of a `Footprint`
    "memory_mb": "memory, MB",
    "file_handles": "file handles",
    "processes": "processes",
    "threads": "threads",
    "object_store_mb": "object store, MB",
    "series": "series for Prometheus",
}


def soak_svg(times_s: Sequence[float], held: Mapping[str, Sequence[Footprint]], strikes_s: Sequence[float]) -> str:
    """A panel for every figure, a line for each of what runs, and a mark below for every fault."""
    rows = -(-len(TITLES) // COLUMNS)
    height = TOP + rows * (PANEL_HEIGHT + GAP)
    legend = "".join(
        f'<path d="M{LEFT + 130 * number} 40h22" stroke="{COLOURS[number]}" stroke-width="3"/>'
        f'<text x="{LEFT + 130 * number + 30}" y="44">{name}</text>'
        for number, name in enumerate(held)
    )
    mark = f'<path d="M{LEFT + 265} 36v8" stroke="#8a8a8a"/><text x="{LEFT + 272}" y="44">a fault</text>'
    panels = []
    for number, (name, title) in enumerate(TITLES.items()):
        x = LEFT + (number % COLUMNS) * (PANEL_WIDTH + LEFT)
        y = TOP + (number // COLUMNS) * (PANEL_HEIGHT + GAP) + 14
        lines = {tree: [getattr(one, name) for one in footprints] for tree, footprints in held.items()}
        panels.append(f'<g transform="translate({x} {y})">{_panel(title, times_s, lines, strikes_s)}</g>')
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            'font-family="system-ui, sans-serif" font-size="12" fill="#222">',
            f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
            f'<text x="{LEFT}" y="20" font-weight="600">What training and serving hold while parts of them fail</text>',
            legend + mark,
            *panels,
            "</svg>\n",
        ]
    )


def _panel(
    title: str, times_s: Sequence[float], lines: Mapping[str, Sequence[float | None]], strikes_s: Sequence[float]
) -> str:
    known = [value for values in lines.values() for value in values if value is not None]
    ticks = nice_ticks(0.0, max(known, default=0.0) or 1.0, 3)
    end_s = max(times_s[-1], 1.0)

    def x(time_s: float) -> float:
        return percent(time_s, 0.0, end_s) / 100 * PANEL_WIDTH

    def y(value: float) -> float:
        return PANEL_HEIGHT * (1 - percent(value, 0.0, ticks[-1]) / 100)

    parts = [f'<text y="-8" font-weight="600">{title}</text>']
    for tick in ticks:
        parts.append(f'<path d="M0 {y(tick):.1f}h{PANEL_WIDTH}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="-6" y="{y(tick) + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    parts += [f'<path d="M{x(time_s):.1f} {PANEL_HEIGHT}v6" stroke="#8a8a8a"/>' for time_s in strikes_s]
    for minute in nice_ticks(0.0, end_s / 60, 4):
        if minute * 60 <= end_s:
            parts.append(
                f'<text x="{x(minute * 60):.1f}" y="{PANEL_HEIGHT + 20}" text-anchor="middle">{minute:g} min</text>'
            )
    for colour, values in zip(COLOURS, lines.values(), strict=False):
        points = [
            f"{x(time_s):.1f} {y(value):.1f}"
            for time_s, value in zip(times_s, values, strict=True)
            if value is not None
        ]
        if points:
            parts.append(f'<path d="M{"L".join(points)}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    return "".join(parts)
