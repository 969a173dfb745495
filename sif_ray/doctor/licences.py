"""What may be done with known models, by their published cards."""

from __future__ import annotations

from pathlib import Path

from sif_ray.depth.checkpoint import NON_COMMERCIAL

POLICIES = {
    "qwen2.5-vl-3b": "Qwen Research License: no commercial use",
    "qwen2.5-vl-72b": "Qwen License: a licence of its own above 100 million users a month",
}
"""Restrictions of policies, by a part of their name; Qwen2.5-VL 7B and 32B and Qwen3-VL are Apache-2.0."""


def restriction_of_policy(model: str) -> str:
    """ "" where none is known."""
    return next((text for name, text in POLICIES.items() if name in model.lower()), "")


def restriction_of_depth(model: str) -> str:
    """ "" where none is known."""
    is_restricted = any(size in Path(model).name for size in NON_COMMERCIAL)
    return "Depth Anything V2 Base, Large and Giant are CC-BY-NC-4.0: no commercial use" if is_restricted else ""
