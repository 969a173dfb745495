"""HTML pages in one file: templates that escape every text, and pictures inside the page."""

from __future__ import annotations

import jinja2

from sif_ray.observe import charts
from sif_ray.observe.progress import format_seconds


def templates(*packages: str) -> jinja2.Environment:
    """The templates of `packages`, then those of this one; the filters `short` and `clock` write numbers."""
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package) for package in (*packages, "sif_ray.observe")]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": charts.short, "clock": format_seconds}
    return environment
