"""NMS-AP against pycocotools fed by a second, naive filter, on random detections with ties."""

from __future__ import annotations

import contextlib
import io
import itertools
import json

import numpy as np
import pytest
from benchmark_files import headline, ovdeval, replies
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sif_ray.evaluate.benchmarks import BENCHMARKS
from sif_ray.evaluate.benchmarks.ovdeval import ASPECTS, detections
from sif_ray.evaluate.bootstrap import draws
from sif_ray.evaluate.measure import sample_all
from sif_ray.evaluate.nms_ap import LabelledBox, match, suppress, weighted_ap

LABELS = ("cup", "plate", "fork")


def random_boxes(rng: np.random.Generator, num_images: int, num_boxes: int) -> list[LabelledBox]:
    """On a coarse grid, so that boxes meet, with few different scores."""
    found = []
    for _ in range(num_boxes):
        x, y, width, height = (10.0 * float(number) for number in (*rng.integers(0, 4, 2), *rng.integers(2, 5, 2)))
        label, score = LABELS[rng.integers(3)], float(rng.choice([0.5, 1.0]))
        found.append(LabelledBox(int(rng.integers(num_images)), label, (x, y, x + width, y + height), score))
    return found


def naive_iou(a, b) -> float:
    """By counting the unit cells of the grid; the boxes have whole corners."""
    cells = [set(itertools.product(range(int(x1), int(x2)), range(int(y1), int(y2)))) for x1, y1, x2, y2 in (a, b)]
    return len(cells[0] & cells[1]) / len(cells[0] | cells[1])


def naive_filter(found: list[LabelledBox], truths: list[LabelledBox], last_wins: bool) -> list[LabelledBox]:
    """Box by box: it goes if a true box prefers another one near it and no true box prefers it."""
    order = list(range(len(found)))[:: -1 if last_wins else 1]

    def favourite(truth: LabelledBox) -> int | None:
        near = [i for i in order if naive_iou(found[i].box_xyxy_px, truth.box_xyxy_px) > 0.5]
        return max(near, key=lambda i: found[i].score) if near else None  # the first of equals

    favourites = {favourite(truth) for truth in truths}
    return [
        one
        for i, one in enumerate(found)
        if i in favourites or not any(naive_iou(one.box_xyxy_px, truth.box_xyxy_px) > 0.5 for truth in truths)
    ]


def official_map(num_images: int, truths: list[LabelledBox], found: list[LabelledBox]) -> float:
    """As the official script calls it: a file of the truth, `loadRes`, `summarize`."""

    def coco(one: LabelledBox) -> dict:
        x1, y1, x2, y2 = one.box_xyxy_px
        box = [x1, y1, x2 - x1, y2 - y1]
        return {"image_id": one.image, "category_id": LABELS.index(one.label) + 1, "bbox": box, "score": one.score}

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": image} for image in range(num_images)],
            "categories": [{"id": number, "name": label} for number, label in enumerate(LABELS, 1)],
            "annotations": [
                {**coco(one), "id": i, "iscrowd": 0, "area": coco(one)["bbox"][2] * coco(one)["bbox"][3]}
                for i, one in enumerate(truths, 1)
            ],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes([coco(one) for one in found]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


@pytest.mark.parametrize("last_wins", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_nms_ap_is_that_of_pycocotools_behind_a_naive_filter(seed, last_wins):
    rng = np.random.default_rng(seed)
    truths, found = random_boxes(rng, 6, 20), random_boxes(rng, 6, 60)
    ours, theirs = [], []
    for image in range(6):
        here, there = ([one for one in boxes if one.image == image] for boxes in (found, truths))
        ours += suppress(here, [one.box_xyxy_px for one in there], last_wins)
        theirs += naive_filter(here, there, last_wins)
    assert ours == theirs and len(ours) < len(found)
    assert match(6, truths, ours).mean_ap == pytest.approx(official_map(6, truths, theirs), abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_the_filter_keeps_at_most_one_detection_for_a_true_box_alone(seed, last_wins):
    rng = np.random.default_rng(seed)
    found, [truth] = random_boxes(rng, 1, 12), random_boxes(rng, 1, 1)
    kept = suppress(found, [truth.box_xyxy_px], last_wins)
    near = [one for one in found if naive_iou(one.box_xyxy_px, truth.box_xyxy_px) > 0.5]
    kept_near = [one for one in kept if naive_iou(one.box_xyxy_px, truth.box_xyxy_px) > 0.5]
    assert len(kept_near) == bool(near)
    assert [one for one in found if one not in near] == [one for one in kept if one not in kept_near]
    assert not near or kept_near[0].score == max(one.score for one in near)


def test_of_equal_scores_the_first_or_the_last_stays():
    truth = (0.0, 0.0, 10.0, 10.0)
    found = [LabelledBox(0, label, truth) for label in LABELS]
    assert [one.label for one in suppress(found, [truth], last_wins=False)] == ["cup"]
    assert [one.label for one in suppress(found, [truth], last_wins=True)] == ["fork"]


@pytest.mark.parametrize("seed", range(4))
def test_every_image_once_gives_the_map_itself(seed):
    """The bootstrap computes AP on its own; where nothing is resampled it must be pycocotools'."""
    rng = np.random.default_rng(seed)
    truths, found = random_boxes(rng, 8, 25), random_boxes(rng, 8, 80)
    matches = match(8, truths, found)
    once = np.ones((1, 8), dtype=np.int64)
    ap_of_class = [weighted_ap(one, once)[0] for one in matches.classes]
    assert np.nanmean(ap_of_class) == pytest.approx(matches.mean_ap, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_a_resample_is_the_map_of_a_data_set_with_its_images(seed):
    """Against pycocotools on copies of the images; different scores, as ties would interleave the copies."""
    rng = np.random.default_rng(seed)
    truths, found = random_boxes(rng, 5, 15), random_boxes(rng, 5, 40)
    scores = rng.permutation(len(found)) / len(found)
    found = [LabelledBox(one.image, one.label, one.box_xyxy_px, float(s)) for one, s in zip(found, scores, strict=True)]
    resamples_B = match(5, truths, found).resampled(num_samples=4, seed=seed)
    [draws_BI] = draws(5, 4, seed)
    for value, draws_I in zip(resamples_B, draws_BI, strict=True):
        copies = [image for image in range(5) for _ in range(draws_I[image])]

        def copied(boxes, copies=copies):
            return [
                LabelledBox(copy, one.label, one.box_xyxy_px, one.score)
                for copy, image in enumerate(copies)
                for one in boxes
                if one.image == image
            ]

        assert value == pytest.approx(official_map(5, copied(truths), copied(found)), abs=1e-9)


def test_without_detections_the_map_is_zero_and_without_truth_there_is_none():
    [truth] = random_boxes(np.random.default_rng(0), 1, 1)
    assert match(1, [truth], []).mean_ap == 0
    assert np.isnan(match(1, [], [truth]).mean_ap)


# ------------------------------------------------------------------------------------------------- OVDEval


def listed(*entries) -> str:
    return f"<answer>{json.dumps([{'bbox_2d': box, 'label': label} for label, box in entries])}</answer>"


def test_boxes_are_fractions_or_pixels(tmp_path):
    path = ovdeval(tmp_path)
    in_pixels, as_fractions = listed(("Red cup", [10, 20, 40, 60])), listed(("red cup", [0.1, 0.1, 0.4, 0.3]))
    for text in (in_pixels, as_fractions):
        [reply, _] = replies(BENCHMARKS["ovdeval"], path, [text, ""])
        [(label, box)] = detections(reply)
        assert label == "red cup" and box == pytest.approx((10, 20, 40, 60))


@pytest.mark.parametrize(
    ("text", "num"),
    [("", None), ("<answer>a cup</answer>", None), ("<answer>None</answer>", 0), ("<answer>[]</answer>", 0),
     ('<answer>[{"label": "red cup"}, {"bbox_2d": [0, 0, 1, 1]}, 3]</answer>', 0),
     ('<answer>[{"label": "red cup", "bbox_2d": [0.5, 0.5, 0.1, 0.1]}]</answer>', 0)],
)  # fmt: skip
def test_what_is_no_detection(tmp_path, text, num):
    [reply, _] = replies(BENCHMARKS["ovdeval"], ovdeval(tmp_path), [text, ""])
    found = detections(reply)
    assert (None if found is None else len(found)) == num


def test_perfect_and_contradictory_answers(tmp_path):
    path = ovdeval(tmp_path)
    right = [listed(("red cup", [10, 20, 40, 60])), listed(("blue cup", [50, 20, 90, 60]))]
    assert headline("ovdeval", replies(BENCHMARKS["ovdeval"], path, right)) == pytest.approx((1, 1))
    # Both labels on each box: plain AP would still be 1, as the wrong label's class has its truth elsewhere.
    both = [
        listed(("red cup", [10, 20, 40, 60]), ("blue cup", [10, 20, 40, 60])),
        listed(("red cup", [50, 20, 90, 60]), ("blue cup", [50, 20, 90, 60])),
    ]
    # The first of two stays: right, then wrong. Red has one hit before one miss, blue has none.
    strict, published = headline("ovdeval", replies(BENCHMARKS["ovdeval"], path, both))
    assert strict == pytest.approx(0.5)
    # The last stays: wrong, then right. Blue has a miss before its hit: precision 1/2 at every recall.
    assert published == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("row", "average"),
    [
        ((13.2, 26.5, 21.3, 2.9, 11.6, 47.9, 13.1, 38.7), 25.46),
        ((48.4, 35.8, 44.6, 3.0, 10.5, 40.5, 16.2, 39.0), 29.08),
        ((50.4, 34.9, 50.7, 4.3, 7.6, 33.7, 13.1, 34.4), 26.50),
        ((55.0, 34.6, 47.9, 4.5, 9.7, 42.9, 21.5, 37.7), 31.01),
    ],
)
def test_the_average_is_the_published_one(tmp_path, row, average):
    """Four printed rows of eight columns with their printed averages."""
    for name in (name for names in ASPECTS.values() for name in names):
        ovdeval(tmp_path, name)
    found = replies(BENCHMARKS["ovdeval"], tmp_path, [""] * 16)
    [measure] = BENCHMARKS["ovdeval"].measure(found)
    columns = ("celebrity", "logo", "landmark", "color", "material", "position", "relationship", "negation")
    values = dict(zip(columns, row, strict=True))
    assert sum(weight * values[group] for group, weight in measure.totals["overall"].items()) == pytest.approx(
        average, abs=0.006
    )


def test_intervals_hold_the_score(tmp_path):
    path = ovdeval(tmp_path)
    found = replies(BENCHMARKS["ovdeval"], path, [listed(("red cup", [10, 20, 40, 60])), ""])
    [measure] = BENCHMARKS["ovdeval"].measure(found)
    sampled = sample_all(measure, 500, 0)["strict"]["overall"]
    low, high = sampled.interval()
    assert low <= sampled.value <= high and sampled.value == pytest.approx(0.5)
