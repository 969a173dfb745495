"""What a row must fulfil before it is trained on, read from its text alone: whoever wrote the trace is not trusted."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sif_ray.judge.exact import ExactMatchJudge
from sif_ray.method.boxes import FULL_IMAGE, Box, BoxError, is_box
from sif_ray.method.depth_code import checked_box_mean
from sif_ray.method.profile import resolve
from sif_ray.method.trace import AreaBox, Reason, TraceError, find_answer, parse
from sif_ray.records import Sample

EXPLANATIONS = {
    "boxes_invalid": "the evidence boxes are no boxes in the image",
    "first_frame_not_whole_image": "the first area is not the whole image",
    "boxes_not_schedule": "the boxes of the areas are not the given boxes in the given order",
    "last_boxes_not_evidence": "the boxes of the last area are not those of the evidence",
    "depth_not_box_mean": "the depth of a box is not the given one",
    "answer_not_truth": "the answer is not the given answer",
    "teacher_cut": "it was cut off because it is too long",
    **{f"trace_{reason}": reason.explanation for reason in Reason},
}
"""What the words of `faults` mean, and the further one that a teacher is told."""

_TEXT = ExactMatchJudge()
_SLACK = 1e-9


def faults(sample: Sample, depth_rel: npt.NDArray[np.float64], decimals: int) -> list[str]:
    """Stable words for everything wrong with a row; empty = accepted. `depth_rel` is (H, W), 0 = near.

    Beside `form_faults`: the answer is the truth, both compared as text (sif_ray.judge.exact).
    """
    found = form_faults(sample, depth_rel, decimals)
    answer = find_answer(sample.trace)
    if answer is not None and not _TEXT.same(sample.question, sample.answer, answer):
        found.append("answer_not_truth")
    return found


def form_faults(sample: Sample, depth_rel: npt.NDArray[np.float64], decimals: int) -> list[str]:
    """What is wrong with a row whatever its answer says.

    The trace parses in the sample's profile; it starts with the whole image; its boxes are the forward frames; the last
    ones are the evidence, up to rounding; every depth is the mean of its box, up to rounding.
    """
    found = []
    if not sample.boxes or not all(map(is_box, sample.boxes)):
        found.append("boxes_invalid")
    try:
        trace = parse(sample.trace, sample.profile)
    except TraceError as error:
        return [*found, *(f"trace_{reason}" for reason in error.reasons)]
    areas = [[box.bbox_2d for box in step.boxes] for step in trace.steps]
    if areas[0] != [FULL_IMAGE]:
        found.append("first_frame_not_whole_image")
    if areas != [list(frame) for frame in sample.frames]:
        found.append("boxes_not_schedule")
    if not _same_boxes(areas[-1], sample, decimals):
        found.append("last_boxes_not_evidence")
    if not all(_depth_right(box, depth_rel, decimals) for step in trace.steps for box in step.boxes):
        found.append("depth_not_box_mean")
    return found


def _same_boxes(boxes: list[Box], sample: Sample, decimals: int) -> bool:
    """Within rounding: to 3 decimals when the frame was made and to `decimals` when it was written. The published
    profile also moves evidence to whole pixels."""
    if len(boxes) != len(sample.boxes):
        return False
    rounding = 0.5 * 10**-decimals + 0.5e-3 + _SLACK
    if resolve(sample.profile).expansion == "remaining_space":
        slack_x, slack_y = rounding + 1 / sample.width, rounding + 1 / sample.height
    else:
        slack_x = slack_y = rounding
    return all(
        abs(stated - true) <= slack
        for box, evidence in zip(boxes, sample.boxes, strict=True)
        for stated, true, slack in zip(box, evidence, (slack_x, slack_y) * 2, strict=True)
    )


def _depth_right(box: AreaBox, depth_rel: npt.NDArray[np.float64], decimals: int) -> bool:
    try:
        mean = checked_box_mean(depth_rel, box.bbox_2d)
    except BoxError:  # thinner than a pixel
        return False
    return box.depth is not None and abs(box.depth - mean) <= 0.5 * 10**-decimals + _SLACK
