"""Reverse expansion, forward inference: the frames that lead the teacher from the image to the evidence (paper, data).

Reversed, the evidence boxes grow: expand and merge, hull, perhaps a look elsewhere, the whole image. The teacher sees
the same frames forward, so that attention is narrowed, and now and then corrected.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sif_ray.method.boxes import FULL_IMAGE, Box, BoxError, as_boxes, hull, iou, norm_to_pixels
from sif_ray.method.profile import Profile, resolve

Frame = list[Box]
"""The boxes shown at once."""

NUM_EXPANSIONS = 5
"""A first expansion goes one of this many steps towards the edge of the image."""
MIN_MARGIN_STEP = 0.05
"""Least a side moves outwards in the corrected profile, as a fraction of the image side."""
DISTRACTOR_PROBABILITY = 0.5
DISTRACTOR_MAX_IOU = 0.001
DISTRACTOR_GROWTH = 1.2
DISTRACTOR_SCALE = (0.7, 1.3)
DISTRACTOR_TRIES = 1000
DECIMALS = 3


def forward_frames(
    boxes: Sequence[Sequence[float]],
    width: int,
    height: int,
    rng: np.random.Generator,
    profile: str | Profile = "corrected",
) -> list[Frame]:
    """Frames in the order the teacher sees them: whole image, [distractor], [hull], first expansion, evidence boxes.

    The hull is a frame only if several boxes are left after the expansion; the distractor comes half of the time. All
    boxes are image frame, valid and rounded to 3 decimals; the evidence boxes stand last and the whole image first.
    Published: evidence and expansion also pass through whole pixels, and there are always 3 to 5 frames. Corrected: a
    frame equal to the one before it is left out, so evidence that fills the image gives the single frame of the image.

    Args:
        boxes: evidence, fractions of the image, at least one.
        width: of the image, px.
        height: of the image, px.

    Raises:
        BoxError: for no boxes, boxes outside the image, or an impossible size.
    """
    return reverse_expansion(boxes, width, height, rng, profile)[::-1]


def reverse_expansion(
    boxes: Sequence[Sequence[float]],
    width: int,
    height: int,
    rng: np.random.Generator,
    profile: str | Profile = "corrected",
) -> list[Frame]:
    """The frames of :func:`forward_frames` in the order they are made, evidence first."""
    rules = resolve(profile)
    evidence = as_boxes(boxes)
    if not evidence:
        raise BoxError("boxes is empty; frames are made from at least one evidence box")
    norm_to_pixels(FULL_IMAGE, width, height)
    expanded = merge_overlapping(expand(evidence, width, height, rules))
    if rules.expansion == "remaining_space":
        evidence, expanded = ([_whole_pixels(box, width, height) for box in frame] for frame in (evidence, expanded))
    frames = [[_rounded(box) for box in evidence], [_rounded(box) for box in expanded]]
    merged = hull(frames[1])
    if len(frames[1]) > 1:
        frames.append([merged])
    if rng.random() < DISTRACTOR_PROBABILITY:
        look = _rounded(distractor(merged, rng))
        if iou(merged, look) < DISTRACTOR_MAX_IOU:
            frames.append([look])
    frames.append([FULL_IMAGE])
    return frames if rules.repeated_frames_kept else _without_repeats(frames)


def expand(boxes: Sequence[Box], width: int, height: int, profile: str | Profile = "corrected") -> list[Box]:
    """Every box moved outwards once, clipped to the image.

    Published: all sides move ``max(rem_x W / 5, rem_y H / 5, 1)`` px, where ``rem_x = 1 - max x1 - min x2`` (likewise
    y) is meant as the space left but is 0 for a centred box, so the step is often 1 px. Corrected: each side moves a
    fifth of its own distance to the edge, at least 5 % of the image.
    """
    if resolve(profile).expansion == "remaining_space":
        x1_N, y1_N, x2_N, y2_N = np.array(boxes).T
        step_px = max(
            (1 - x1_N.max() - x2_N.min()) * width / NUM_EXPANSIONS,
            (1 - y1_N.max() - y2_N.min()) * height / NUM_EXPANSIONS,
            1.0,
        )
        steps = [(step_px / width, step_px / height) * 2] * len(boxes)
    else:
        steps = [
            (_margin_step(x1), _margin_step(y1), _margin_step(1 - x2), _margin_step(1 - y2)) for x1, y1, x2, y2 in boxes
        ]
    return [
        (max(x1 - left, 0.0), max(y1 - top, 0.0), min(x2 + right, 1.0), min(y2 + bottom, 1.0))
        for (x1, y1, x2, y2), (left, top, right, bottom) in zip(boxes, steps, strict=True)
    ]


def merge_overlapping(boxes: Sequence[Box]) -> list[Box]:
    """Boxes that overlap replaced by their hull until no two do; boxes that only touch stay apart."""
    apart: list[Box] = []
    for box in boxes:
        grown = box
        while overlapping := [other for other in apart if _overlap(grown, other)]:
            apart = [other for other in apart if other not in overlapping]
            grown = hull([grown, *overlapping])
        apart.append(grown)
    return apart


def distractor(box: Box, rng: np.random.Generator) -> Box:
    """A box of about the size of ``box`` somewhere else in the image: where a careless look could go first.

    Grown by 1.2 and scaled by a factor in [0.7, 1.3], then put into one of the image's corners whose free space next to
    ``box`` holds it, at random; else the first of 1000 random places with IoU < 0.001; else left around ``box``.
    """
    x1, y1, x2, y2 = box
    scale = DISTRACTOR_GROWTH * rng.uniform(*DISTRACTOR_SCALE)
    width, height = min((x2 - x1) * scale, 1.0), min((y2 - y1) * scale, 1.0)
    lefts = [left for left, space in ((0.0, x1), (1 - width, 1 - x2)) if width <= space]
    tops = [top for top, space in ((0.0, y1), (1 - height, 1 - y2)) if height <= space]
    corners = [(left, top) for left in lefts for top in tops]
    if corners:
        left, top = corners[rng.integers(len(corners))]
        return (left, top, left + width, top + height)
    left_T, top_T = rng.random((2, DISTRACTOR_TRIES)) * [[1 - width], [1 - height]]
    overlap_T = np.maximum(np.minimum(left_T + width, x2) - np.maximum(left_T, x1), 0) * np.maximum(
        np.minimum(top_T + height, y2) - np.maximum(top_T, y1), 0
    )
    union_T = (x2 - x1) * (y2 - y1) + width * height - overlap_T
    apart = np.flatnonzero(overlap_T < DISTRACTOR_MAX_IOU * union_T)
    if len(apart):
        left, top = float(left_T[apart[0]]), float(top_T[apart[0]])
        return (left, top, left + width, top + height)
    left = min(max((x1 + x2 - width) / 2, 0.0), 1 - width)
    top = min(max((y1 + y2 - height) / 2, 0.0), 1 - height)
    return (left, top, left + width, top + height)


def _margin_step(margin: float) -> float:
    return max(margin / NUM_EXPANSIONS, MIN_MARGIN_STEP)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _whole_pixels(box: Box, width: int, height: int) -> Box:
    x1, y1, x2, y2 = (round(value) for value in norm_to_pixels(box, width, height))
    (x1, x2), (y1, y2) = _at_least_one(x1, x2, width), _at_least_one(y1, y2, height)
    return (x1 / width, y1 / height, x2 / width, y2 / height)


def _rounded(box: Box) -> Box:
    """To 3 decimals; a side thinner than that becomes 0.001."""
    unit: int = 10**DECIMALS
    x1, y1, x2, y2 = (min(max(round(value * unit), 0), unit) for value in box)
    (x1, x2), (y1, y2) = _at_least_one(x1, x2, unit), _at_least_one(y1, y2, unit)
    return (x1 / unit, y1 / unit, x2 / unit, y2 / unit)


def _at_least_one(low: int, high: int, size: int) -> tuple[int, int]:
    low = min(low, size - 1)
    return low, max(high, low + 1)


def _without_repeats(frames: list[Frame]) -> list[Frame]:
    return [frame for index, frame in enumerate(frames) if index == 0 or frame != frames[index - 1]]
