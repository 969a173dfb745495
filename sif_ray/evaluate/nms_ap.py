"""NMS-AP of open-vocabulary detection (OVDEval, arXiv 2308.13177): COCO's mAP after a filter that ignores classes.

Several labels on one object would raise the plain AP. So for every true box the detections of any class whose IoU with
it is above one half are reduced to the one of highest score, unless another true box keeps them. AP itself is
pycocotools'.

Dimension suffixes: T IoU thresholds, D detections of a class in the order of their scores, B resamples, I images.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from sif_ray.evaluate.bootstrap import Seed, draws
from sif_ray.evaluate.measure import Convention, Sampled
from sif_ray.method.boxes import Box, iou

MIN_IOU = 0.5  # exclusive
MAX_DETECTIONS = 100  # of an image
_NUM_THRESHOLDS = 10  # IoU 0.5 to 0.95
_RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class LabelledBox:
    """A true box or a detection. A policy that writes boxes states no scores, so all detections have the same.

    Example: `LabelledBox(0, "white cup", (10.0, 20.0, 50.0, 80.0))`.
    """

    image: int  # index of the image
    label: str
    box_xyxy_px: Box
    score: float = 1.0


def suppress(detections: Sequence[LabelledBox], truths: Sequence[Box], last_wins: bool) -> list[LabelledBox]:
    """The detections of one image that the filter keeps, in their order.

    Of equal scores the first counts as the higher one or, with `last_wins`, the last, as in the official script.
    """
    kept, dropped = set(), set()
    for truth in truths:
        near = [index for index, one in enumerate(detections) if iou(one.box_xyxy_px, truth) > MIN_IOU]
        if not near:
            continue
        best = max(near, key=lambda index: (detections[index].score, index if last_wins else -index))
        kept.add(best)
        dropped.update(set(near) - {best})
    return [one for index, one in enumerate(detections) if index not in dropped - kept]


@dataclass(frozen=True)
class _ClassMatches:
    """The detections of one class over all images, best score first, as COCO matched them."""

    image_D: npt.NDArray[np.int64]  # index of the image of each
    matched_T_D: npt.NDArray[np.bool_]
    ignored_T_D: npt.NDArray[np.bool_]
    truths_I: npt.NDArray[np.int64]  # how many true boxes each image has


@dataclass(frozen=True)
class DetectionMatches:
    """Everything that the mAP of one annotation file depends on."""

    mean_ap: float  # pycocotools'; NaN without a true box
    classes: tuple[_ClassMatches, ...]
    num_images: int

    def resampled(self, num_samples: int, seed: Seed) -> npt.NDArray[np.float64]:
        """mAP of every resample of whole images, (B,)."""
        ap_sum_B, num_B = np.zeros(num_samples), np.zeros(num_samples)
        most = max((one.matched_T_D.size for one in self.classes), default=1)
        start = 0
        for draws_BI in draws(self.num_images, num_samples, seed, width=most):
            rows = slice(start, start := start + len(draws_BI))
            for one in self.classes:
                ap_B = weighted_ap(one, draws_BI)
                there_B = np.isfinite(ap_B)
                ap_sum_B[rows] += np.where(there_B, ap_B, 0.0)
                num_B[rows] += there_B
        with np.errstate(invalid="ignore"):
            return ap_sum_B / num_B


def match(num_images: int, truths: Sequence[LabelledBox], detections: Sequence[LabelledBox]) -> DetectionMatches:
    """COCO's matching of detections with true boxes, class by class."""
    from pycocotools.cocoeval import COCOeval

    labels = sorted({one.label for one in truths})
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        coco = COCOeval(_coco(num_images, labels, truths), _coco(num_images, labels, detections), "bbox")
        coco.params.areaRng, coco.params.areaRngLbl = [[0.0, 1e10]], ["all"]
        coco.params.maxDets = [MAX_DETECTIONS]
        coco.evaluate()
        coco.accumulate()
    precision = coco.eval["precision"]
    stated = precision[precision > -1]
    # evalImgs runs over classes, then areas (one), then images; None where neither side has a box.
    starts = range(0, len(coco.evalImgs), num_images)
    classes = tuple(_class_matches(coco.evalImgs[start : start + num_images]) for start in starts)
    return DetectionMatches(float(stated.mean()) if stated.size else float("nan"), classes, num_images)


def _coco(num_images: int, labels: Sequence[str], boxes: Sequence[LabelledBox]) -> Any:
    from pycocotools.coco import COCO

    category_ids = {label: number for number, label in enumerate(labels, 1)}
    found = COCO()
    found.dataset = {
        "images": [{"id": image} for image in range(num_images)],
        "categories": [{"id": number, "name": label} for label, number in category_ids.items()],
        "annotations": [
            {
                "id": number,  # from 1: COCO takes 0 for "not matched"
                "image_id": one.image,
                "category_id": category_ids[one.label],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
                "score": one.score,
            }
            for number, one in enumerate((one for one in boxes if one.label in category_ids), 1)
            for x1, y1, x2, y2 in [one.box_xyxy_px]
        ],
    }
    found.createIndex()
    return found


def _class_matches(images: Sequence[Mapping[str, Any] | None]) -> _ClassMatches:
    there = [(index, image) for index, image in enumerate(images) if image is not None]
    scores_D = np.concatenate([np.zeros(0), *(image["dtScores"] for _, image in there)])
    order_D = np.argsort(-scores_D, kind="mergesort")
    empty = np.zeros((_NUM_THRESHOLDS, 0))
    truths_I = np.zeros(len(images), dtype=np.int64)
    for index, image in there:
        truths_I[index] = np.count_nonzero(np.asarray(image["gtIgnore"]) == 0)
    return _ClassMatches(
        image_D=np.concatenate([np.zeros(0, int), *(np.full(len(i["dtScores"]), n) for n, i in there)])[order_D],
        matched_T_D=np.concatenate([empty, *(image["dtMatches"] for _, image in there)], axis=1)[:, order_D] > 0,
        ignored_T_D=np.concatenate([empty, *(image["dtIgnore"] for _, image in there)], axis=1)[:, order_D] > 0,
        truths_I=truths_I,
    )


def weighted_ap(matches: _ClassMatches, draws_BI: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """AP of a class where image i counts `draws_BI[b, i]` times, (B,); NaN where no image has a true box.

    Precision at 101 recalls, mean over thresholds, as pycocotools' `accumulate`.
    """
    truths_B = draws_BI @ matches.truths_I
    counts_BTD = np.where(matches.ignored_T_D, 0, draws_BI[:, None, matches.image_D])
    hits_BTD = np.cumsum(counts_BTD * matches.matched_T_D, axis=2)
    all_BTD = np.cumsum(counts_BTD, axis=2)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision_BTD = hits_BTD / np.maximum(all_BTD, 1)
        recall_BTD = hits_BTD / truths_B[:, None, None]
    # The best precision at this recall or a higher one.
    precision_BTD = np.maximum.accumulate(precision_BTD[..., ::-1], axis=2)[..., ::-1]
    # A recall threshold takes the precision of the first detection that reaches it.
    reached_BTD = np.searchsorted(_RECALLS, recall_BTD, side="right")
    taken_BTD = np.diff(reached_BTD, axis=2, prepend=0)
    ap_B: npt.NDArray[np.float64] = (precision_BTD * taken_BTD).sum(axis=2).mean(axis=1) / len(_RECALLS)
    return np.where(truths_B > 0, ap_B, np.nan)


@dataclass(frozen=True)
class MeanAveragePrecision:
    """A measure (see `sif_ray.evaluate.measure.Measure`) over the matches of several annotation files."""

    name: str
    matches: Mapping[str, Mapping[Convention, DetectionMatches]]  # by group
    totals: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def groups(self) -> Sequence[str]:
        return list(self.matches)

    def sampled(self, group: str, num_samples: int, seed: Seed) -> dict[Convention, Sampled]:
        return {
            convention: Sampled(found.mean_ap, found.resampled(num_samples, seed), found.num_images)
            for convention, found in self.matches[group].items()
        }
