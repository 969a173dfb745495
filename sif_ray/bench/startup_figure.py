"""A start as a picture: a row for each process, a bar for everything it did, seconds across."""

from __future__ import annotations

from collections.abc import Sequence

from sif_ray.observe.loglog import COLOURS
from sif_ray.observe.timeline import Span

WIDTH, LEFT, RIGHT = 720, 96, 16
TOP, ROW, BAR = 40, 44, 20
LETTER = 7  # px; a name that does not fit into its bar stands below it


def startup_svg(spans: Sequence[Span]) -> str:
    """`spans` in seconds since the process was started. Waiting is left white."""
    shown = [span for span in spans if span.kind != "wait"]
    lanes = list(dict.fromkeys(span.lane for span in shown))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(dict.fromkeys(map(_name, shown)))}
    height = TOP + ROW * len(lanes) + 24
    px_per_s = (WIDTH - LEFT - RIGHT) / max(span.end_s for span in shown)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            'font-family="system-ui, sans-serif" font-size="13" fill="#222">',
            f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
            '<text x="16" y="20" font-weight="600">From the start of the process to the first trained step</text>',
            *(_second(second, LEFT + second * px_per_s, height) for second in _seconds(px_per_s)),
            *(f'<text x="16" y="{TOP + ROW * row + 15}">{lane}</text>' for row, lane in enumerate(lanes)),
            *(_bar(span, px_per_s, TOP + ROW * lanes.index(span.lane), colours[_name(span)]) for span in shown),
            "</svg>\n",
        ]
    )


def _name(span: Span) -> str:
    return str(span.labels.get("what", span.kind))


def _seconds(px_per_s: float) -> range:
    """Marks on the axis, about ten."""
    last_s = (WIDTH - LEFT - RIGHT) / px_per_s
    step_s = next((step for step in (1, 2, 5, 10, 20, 50) if last_s / step <= 10), 100)
    return range(0, int(last_s) + 1, step_s)


def _second(second: int, x: float, height: int) -> str:
    return (
        f'<path d="M{x:.1f} {TOP - 8}V{height - 22}" stroke="#e4e4e4"/>'
        f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{second} s</text>'
    )


def _bar(span: Span, px_per_s: float, y: int, colour: str) -> str:
    x, width, name = (
        LEFT + max(span.start_s, 0.0) * px_per_s,
        (span.end_s - max(span.start_s, 0.0)) * px_per_s,
        _name(span),
    )
    bar = f'<rect x="{x:.1f}" y="{y}" width="{max(width, 1):.1f}" height="{BAR}" fill="{colour}" fill-opacity="0.85"/>'
    if len(name) * LETTER < width:
        return f'{bar}<text x="{x + 5:.1f}" y="{y + 15}" fill="#fff">{name}</text>'
    anchor = "end" if x + len(name) * LETTER > WIDTH - RIGHT else "start"
    at = x + width if anchor == "end" else x
    return f'{bar}<text x="{at:.1f}" y="{y + BAR + 14}" text-anchor="{anchor}" fill="{colour}">{name}</text>'
