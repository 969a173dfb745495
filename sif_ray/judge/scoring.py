"""Reward terms of one output text: the one place where training and evaluation turn a text into numbers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from sif_ray.config import RewardConfig
from sif_ray.method import depth_code, rewards
from sif_ray.method.boxes import Box

TERMS = ("format", "answer", "box", "depth")
"""The terms of the paper: R = r_format + r_ans + r_bbox + r_depth."""

ABLATION_TERMS = ("search", "binary")
"""Terms of the released code that its default leaves out; they weigh 0 unless asked for. Its third, `align`, needs the
reasoning of a second model and is not among them."""


def score_terms(
    text: str,
    *,
    target_boxes: Sequence[Box],
    target_answer: str,
    depth_rel: npt.NDArray[np.float64 | np.uint8],
    answer_score: float,
    previous: float | None,
    profile: str,
) -> dict[str, float]:
    """The unweighted `TERMS` and `ABLATION_TERMS` of `text`, and the diagnostics "iou_last" and "answer_score".

    `depth_rel` is (height, width), 0 = near, as `read_depth` or `check_depth` returns it. `answer_score` is the
    judge's, in [0, 1]; `previous` that of the sample's group one epoch ago, None = no bonus. "iou_last" is the
    hierarchical IoU of the last area with the target, 0 where none can be read.
    """
    return {
        "format": rewards.format_reward(text, profile),
        "answer": rewards.answer_reward(answer_score, previous),
        "box": rewards.box_reward(text, target_boxes, profile),
        "depth": rewards.checked_depth_reward(text, depth_rel, profile),
        "search": rewards.search_reward(text, target_boxes, profile),
        "binary": rewards.binary_reward(text, target_answer),
        "iou_last": rewards.box_iou_reward(text, target_boxes, profile),
        "answer_score": answer_score,
    }


def weighted_total(terms: Mapping[str, float], weights: RewardConfig) -> float:
    """R = sum of weight * term; with `gate_depth_by_iou` the depth term counts min(1, 2 * iou_last)."""
    gates = {"depth": min(1.0, 2 * terms["iou_last"])} if weights.gate_depth_by_iou else {}
    weight_of = {name: getattr(weights, name) for name in (*TERMS, *ABLATION_TERMS)}
    return sum(weight * terms[name] * gates.get(name, 1.0) for name, weight in weight_of.items() if weight)


def read_depth_image(encoded: bytes, profile: str) -> npt.NDArray[np.float64]:
    """depth_rel, (height, width), of an encoded pseudo-colour depth image (see `method.depth_code.decode`)."""
    with Image.open(io.BytesIO(encoded)) as image:
        return depth_code.decode(np.asarray(image.convert("RGB")), profile)


def read_depth(encoded: bytes, profile: str) -> npt.NDArray[np.float64 | np.uint8]:
    """`read_depth_image` as `score_terms` takes it, without decoding colours where the image is indexed by depth, as
    those of `depth.encoding` are: in steps of 1/255, 0 = near."""
    with Image.open(io.BytesIO(encoded)) as image:
        if image.mode == "P" and image.getpalette("RGB") == _NEAR_TO_FAR:
            return np.asarray(image)
    return read_depth_image(encoded, profile)


_NEAR_TO_FAR = depth_code.PALETTE_RGB[::-1].ravel().tolist()  # none is gray, so any image of them is coloured
