"""HTML pages in one file: templates that escape every text, and pictures inside the page."""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser
from pathlib import Path

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


def add_open_argument(parser: argparse.ArgumentParser) -> None:
    """The argument `--open`, for `show`."""
    parser.add_argument("--open", choices=("yes", "no"), help="show it in a browser (default: yes on a desktop)")


def show(page: Path, choice: str | None) -> None:
    """Open a page in a browser: "yes", "no", or None, where somebody sits at a desktop."""
    if choice == "yes" or (choice is None and _has_desktop()):
        webbrowser.open(page.absolute().as_uri())


def _has_desktop() -> bool:
    return sys.stdout.isatty() and (sys.platform != "linux" or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()))
