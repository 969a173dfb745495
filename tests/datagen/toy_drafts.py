"""Drafts of the toy world as they reach the teacher."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sif_ray.config import GenerateConfig
from sif_ray.datagen.drafts import Draft
from sif_ray.datagen.pipeline import open_draft
from sif_ray.datagen.source import make_source
from sif_ray.depth.encoding import depth_png, gray_png
from sif_ray.toyworld.scenes import SIZE_PX

RAMP = np.tile(np.linspace(0, 1, SIZE_PX), (SIZE_PX, 1))  # depth grows from left to right
GRAY, DEPTH_IMAGE = gray_png(RAMP), depth_png(RAMP)


def toy_drafts(config: GenerateConfig) -> list[Draft]:
    """With depth: `RAMP`."""
    source = make_source(config)
    opened = [open_draft(source, annotation, config.profile) for annotation in source.annotations()]
    return [with_depth(draft) for draft in opened]


def with_depth(draft: Draft) -> Draft:
    sample = replace(draft.sample, depth_image=DEPTH_IMAGE, depth_source="exact")
    return replace(draft, sample=sample, depth_gray=GRAY)
