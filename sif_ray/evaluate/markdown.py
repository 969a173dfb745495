"""The result of a benchmark as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sif_ray.evaluate.measure import CONVENTIONS
from sif_ray.evaluate.reference import Reference


def to_markdown(result: dict[str, Any], references: Sequence[Reference]) -> str:
    """Tables of both conventions beside each other; numbers of others stand in a table of their own."""
    failures = result["parse_failures"]
    lines = [
        f"# {result['summary']}",
        "",
        f"{result['n']} items; {failures['n']} replies could not be read ({failures['rate']:.1%}), "
        f"{result['missing']['n']} are missing, {result['surplus']['n']} belong to no item, "
        f"{result['unjudged']} have no verdict.",
        "",
        f"{result['conventions'][0].upper()}{result['conventions'][1:]}. Intervals: 95 %, bootstrap over images, "
        f"{result['bootstrap']['samples']} resamples.",
    ]
    for measure in result["strict"]["tables"]:
        lines += ["", f"| {measure} | n | {' | '.join(CONVENTIONS)} |", "|---|---:|---:|---:|"]
        for group, found in result["strict"]["tables"][measure].items():
            cells = (_cell(result[convention]["tables"][measure][group]) for convention in CONVENTIONS)
            lines.append(f"| {group} | {found['n']} | {' | '.join(cells)} |")
    if references:
        groups = list(dict.fromkeys(group for one in references for group in one.scores))
        lines += ["", "Published elsewhere, not measured here:", ""]
        lines += [f"| model | {' | '.join(groups)} | unit | source |", f"|---|{'---:|' * len(groups)}---|---|"]
        for one in references:
            cells = (f"{one.scores[group]:g}" if group in one.scores else "–" for group in groups)
            lines.append(f"| {one.model} | {' | '.join(cells)} | {one.unit} | {one.source} |")
    return "\n".join(lines) + "\n"


def _cell(found: dict[str, Any]) -> str:
    if found["score"] is None:
        return "–"
    interval = f" [{found['ci95'][0]:.3f}, {found['ci95'][1]:.3f}]" if found["ci95"] else ""
    return f"{found['score']:.3f}{interval}"
