"""Where a depth model's files are, and what may be done with them."""

from __future__ import annotations

import logging
from pathlib import Path

log = logging.getLogger(__name__)

NON_COMMERCIAL = ("Base", "Large", "Giant")
"""Sizes of Depth Anything V2 under CC-BY-NC-4.0; Small is Apache-2.0."""


def resolve_model(model: str) -> str:
    """The committed tiny model for "toy"; a checkpoint folder or hub id as it is."""
    if model == "toy":
        from sif_ray.toyworld.assets import path

        return str(path("tiny_depth"))
    return model


def tell_licence(model: str) -> None:
    """Warn where a model may not be used commercially. For the process that starts a run: it is told once."""
    if any(size in Path(model).name for size in NON_COMMERCIAL):
        log.warning("%s: Depth Anything V2 Base, Large and Giant are CC-BY-NC-4.0, Small is Apache-2.0", model)
