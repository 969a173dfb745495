"""The scaling of a sweep as an SVG that stands alone: completions per second over GPUs, both logarithmic."""

from __future__ import annotations

from collections.abc import Sequence

from sif_ray.observe.loglog import COLOURS, GREY, Curve, loglog_svg
from sif_ray.plan.figures import Figures

BLUE, RED = COLOURS[:2]


def scaling_svg(pairs: Sequence[tuple[Figures, Figures | None]]) -> str:
    """Simulated runs without and, where there are any, with failures, and what the smallest one would give in
    proportion."""
    sizes = [one.gpus for one, _ in pairs]
    plain = [one.completions_per_s for one, _ in pairs]
    failing = [other.completions_per_s for _, other in pairs if other is not None]
    ideal = [plain[0] * size / sizes[0] for size in sizes]
    curves = [
        Curve("in proportion to the smallest", sizes, ideal, GREY, dashes="3 4", dots=False),
        Curve("without failures", sizes, plain, BLUE),
    ]
    if failing:
        curves.append(Curve("with failures", sizes[: len(failing)], failing, RED, dashes="7 5"))
    return loglog_svg("Trained completions per second, simulated", "GPUs", curves)
