"""Forward frames and a trace for every draft of a shard ("forward inference"), checked whoever wrote it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from sif_ray.config import GenerateConfig
from sif_ray.datagen.checks import faults
from sif_ray.datagen.drafts import Draft
from sif_ray.datagen.teacher import write_trace
from sif_ray.depth.encoding import read_gray
from sif_ray.method.boxes import Box, BoxError, is_box
from sif_ray.method.depth_code import checked_box_mean
from sif_ray.method.expansion import forward_frames
from sif_ray.method.trace import AreaBox, TraceError

ANY_NAME = "relevant part"
"""What the template teacher calls evidence that its source does not name."""

Areas = tuple[tuple[AreaBox, ...], ...]
"""Forward frames with the depth of their boxes: what the steps of a trace must state."""


class TemplateTraces:
    """Traces by the template teacher (sif_ray.datagen.teacher).

    Example: `TemplateTraces(GenerateConfig())(drafts)`.
    """

    def __init__(self, config: GenerateConfig) -> None:
        self._config = config

    def __call__(self, drafts: list[Draft]) -> list[Draft]:
        """The drafts in their order, with frames and trace or with reasons; refused ones are left as they are."""
        return [self._trace(draft) for draft in drafts]

    def _trace(self, draft: Draft) -> Draft:
        draft = with_frames(draft, self._config)
        if draft.reasons:
            return draft
        names = draft.names or (ANY_NAME,) * len(draft.sample.boxes)
        if len(names) != len(draft.sample.boxes):
            return draft.refused("names_not_per_box")
        depth_rel = read_gray(draft.depth_gray)
        areas = areas_of(draft.sample.frames, depth_rel)
        try:
            trace = write_trace(areas, names, draft.sample.answer, self._config.decimals)
        except TraceError as error:
            return draft.refused(*(f"trace_{reason}" for reason in error.reasons))
        draft = replace(draft, sample=replace(draft.sample, trace=trace))
        return draft.refused(*faults(draft.sample, depth_rel, self._config.decimals))


def with_frames(draft: Draft, config: GenerateConfig) -> Draft:
    """The draft with its forward frames, rounded to `config.decimals`; refused if it cannot have a trace.

    The frames follow from seed and sample id, wherever and whenever they are made.
    """
    sample = draft.sample
    if draft.reasons:
        return draft
    empty = [f"{name}_empty" for name in ("question", "answer") if not getattr(sample, name).strip()]
    if empty:
        return draft.refused(*empty)
    rng = sample_rng(config.seed, sample.sample_id)
    try:
        made = forward_frames(sample.boxes, sample.width, sample.height, rng, config.profile)
    except BoxError:
        return draft.refused("boxes_invalid")
    frames = tuple(tuple(_rounded(box, config.decimals) for box in frame) for frame in made)
    if not all(is_box(box) for frame in frames for box in frame):  # thinner than its last decimal
        return draft.refused("boxes_invalid")
    return replace(draft, sample=replace(sample, frames=frames))


def sample_rng(seed: int, sample_id: str) -> np.random.Generator:
    """The same numbers for a row wherever and whenever it is made."""
    digest = hashlib.blake2b(f"{seed}/{sample_id}".encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest))


def areas_of(frames: Sequence[Sequence[Box]], depth_rel: npt.NDArray[np.float64]) -> Areas:
    """The boxes of `frames`, each with the mean of `depth_rel` (H, W) in it."""
    return tuple(tuple(AreaBox(box, checked_box_mean(depth_rel, box)) for box in frame) for frame in frames)


def _rounded(box: Box, decimals: int) -> Box:
    x1, y1, x2, y2 = (round(value, decimals) for value in box)
    return (x1, y1, x2, y2)
