"""The four rewards of GRPO-SIF and the ablation terms (paper: r_format, r_ans, r_bbox, r_depth).

The published total is their plain sum: ``R = r_format + r_ans + r_bbox + r_depth``, in [0, 6]. No term gates another:
boxes and depths are read from ill-formed texts as well. ``text`` is what the policy wrote and may be anything; a value
that is not a string earns 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from sif_ray.method.boxes import FULL_IMAGE, Box, BoxError, as_boxes, hierarchical_iou, is_number
from sif_ray.method.depth_code import check_depth, checked_box_mean
from sif_ray.method.profile import Profile, resolve
from sif_ray.method.trace import AreaBox, TraceError, find_answer, find_areas, parse

DEPTH_TOLERANCE = 0.1
"""Largest relative error of a stated depth that earns reward."""

_FLOAT_SLACK = 1e-9  # an error of exactly 10 % counts, whatever the last bit says


def format_reward(text: object, profile: str | Profile = "corrected") -> float:
    """r_format: 1 if ``text`` is a trace (see :func:`sif_ray.method.trace.parse`), else 0."""
    try:
        parse(text, profile)
    except TraceError:
        return 0.0
    return 1.0


def answer_reward(score: float, previous: float | None) -> float:
    """r_ans = s + max(0, s - s_prev), in [0, 2]: the judge's score and what it gained since the last epoch.

    Args:
        score: s, the judge's score of the answer, in [0, 1].
        previous: s_prev of the sample's group one epoch ago (see :class:`sif_ray.method.progress.ProgressRecord`), in
            [0, 2]; None = no record, no bonus.

    Raises:
        ValueError: for values outside these ranges. A failed judge call has no score: drop the group instead.
    """
    if not is_number(score) or not 0 <= score <= 1:
        raise ValueError(f"score is {score!r}; a judge scores in [0, 1]")
    if previous is None:
        return float(score)
    if not is_number(previous) or not 0 <= previous <= 2:
        raise ValueError(f"previous is {previous!r}; a recorded mean lies in [0, 2], or None if there is none")
    return float(score + max(0.0, score - previous))


def box_reward(text: object, target_boxes: Sequence[Sequence[float]], profile: str | Profile = "corrected") -> float:
    """r_bbox = end + max(0, end - start), in [0, 2]: where the trace ends up and how far it corrected itself.

    ``end`` is the hierarchical IoU of the last area with the target, ``start`` that of the first area that is not
    exactly the whole image, or of the whole image if there is none. 0 without any area. Published: 0 as well if any
    area is unreadable. Corrected: an unreadable area counts as one without boxes, and one without boxes is worth 0 as
    the last look and is passed over as the first, so that rubbish first earns no bonus. The bonus is at most
    the profile's ``box_bonus_cap``.

    Raises:
        BoxError: if ``target_boxes`` are not boxes.
    """
    rules = resolve(profile)
    target = as_boxes(target_boxes, "target_boxes")
    try:
        areas = find_areas(text, strict=rules.unreadable_area_voids_box_reward)
    except TraceError:
        return 0.0
    if not areas:
        return 0.0
    end = _area_iou(areas[-1], target)
    looks = [area for area in areas if [box.bbox_2d for box in area] != [FULL_IMAGE]]
    if not rules.unreadable_area_voids_box_reward:
        looks = [area for area in looks if area]
    start = _area_iou(looks[0], target) if looks else hierarchical_iou([FULL_IMAGE], target)
    bonus = max(0.0, end - start)
    return end + (bonus if rules.box_bonus_cap is None else min(bonus, rules.box_bonus_cap))


def box_iou_reward(
    text: object, target_boxes: Sequence[Sequence[float]], profile: str | Profile = "corrected"
) -> float:
    """``end`` of :func:`box_reward` alone, in [0, 1]: the hierarchical IoU of the last area with the target.

    Raises:
        BoxError: if ``target_boxes`` are not boxes.
    """
    target = as_boxes(target_boxes, "target_boxes")
    try:
        areas = find_areas(text, strict=resolve(profile).unreadable_area_voids_box_reward)
    except TraceError:
        return 0.0
    return _area_iou(areas[-1], target) if areas else 0.0


def depth_reward(text: object, depth_map: npt.ArrayLike, profile: str | Profile = "corrected") -> float:
    """r_depth in [0, 1]: the share of stated depths within 10 % of the mean depth inside the box they stand beside.

    It tests that a trace agrees with its depth image, not that it looks at the right place. A box without pixels or
    with mean depth 0 earns nothing but counts. Published: boxes on the whole image count like others. Corrected: they
    are left out. 0 if no depth is left to count.

    Args:
        depth_map: (height, width) floats in [0, 1], 0 = near.

    Raises:
        DepthError: (a ValueError) if ``depth_map`` is anything else, NaN included.
    """
    return checked_depth_reward(text, check_depth(depth_map, "depth_map"), profile)


def checked_depth_reward(
    text: object, depth_HW: npt.NDArray[np.float64 | np.uint8], profile: str | Profile = "corrected"
) -> float:
    """:func:`depth_reward` for many texts about one map, as :func:`sif_ray.method.depth_code.checked_box_mean` takes
    it."""
    rules = resolve(profile)
    stated = [box for area in find_areas(text) for box in area if box.depth is not None]
    if not rules.depth_reward_counts_full_image:
        stated = [box for box in stated if box.bbox_2d != FULL_IMAGE]
    if not stated:
        return 0.0
    return sum(_depth_agrees(box, depth_HW) for box in stated) / len(stated)


# --------------------------------------------------------------------------------------------- ablations


def search_reward(text: object, target_boxes: Sequence[Sequence[float]], profile: str | Profile = "corrected") -> float:
    """1 if the hierarchical IoU never falls from area to area and rises at least once, else 0.

    Raises:
        BoxError: if ``target_boxes`` are not boxes.
    """
    target = as_boxes(target_boxes, "target_boxes")
    try:
        areas = find_areas(text, strict=resolve(profile).unreadable_area_voids_box_reward)
    except TraceError:
        return 0.0
    ious = [_area_iou(area, target) for area in areas]
    return float(len(ious) > 1 and ious == sorted(ious) and ious[0] < ious[-1])


def binary_reward(text: object, target_answer: str) -> float:
    """1 if the answer is the target character by character, white space around them aside, else 0."""
    return float(find_answer(text) == target_answer.strip())


def align_reward(persuasiveness: float, similarity: float) -> float:
    """Product, in [0, 1], of how persuasive a judge finds a text-only model's reasoning and how alike its answer is.

    Raises:
        ValueError: for a factor outside [0, 1].
    """
    for name, value in (("persuasiveness", persuasiveness), ("similarity", similarity)):
        if not is_number(value) or not 0 <= value <= 1:
            raise ValueError(f"{name} is {value!r}; a judge scores in [0, 1]")
    return float(persuasiveness * similarity)


def _area_iou(area: Sequence[AreaBox], target: Sequence[Box]) -> float:
    return _iou_of(tuple(box.bbox_2d for box in area), tuple(target))


@lru_cache(maxsize=64)  # the terms of one text ask for the same areas
def _iou_of(boxes: tuple[Box, ...], target: tuple[Box, ...]) -> float:
    return hierarchical_iou(boxes, target)


def _depth_agrees(box: AreaBox, depth_HW: npt.NDArray[np.float64 | np.uint8]) -> bool:
    try:
        mean = checked_box_mean(depth_HW, box.bbox_2d)
    except BoxError:
        return False
    return box.depth is not None and mean > 0 and abs(mean - box.depth) / mean <= DEPTH_TOLERANCE + _FLOAT_SLACK
