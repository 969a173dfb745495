"""Where a depth model's files are."""

from __future__ import annotations


def resolve_model(model: str) -> str:
    """The committed tiny model for "toy"; a checkpoint folder or hub id as it is."""
    if model == "toy":
        from sif_ray.toyworld.assets import path

        return str(path("tiny_depth"))
    return model
