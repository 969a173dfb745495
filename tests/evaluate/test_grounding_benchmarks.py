"""Visual-CoT's detection and RefCOCO in both frames, against boxes worked out by hand and a second computation."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
from benchmark_files import SAMPLES, boxes, headline, needs_samples, output, replies, viscot
from hypothesis import given
from hypothesis import strategies as st

from sif_ray.evaluate.benchmarks import BENCHMARKS, choose
from sif_ray.evaluate.benchmarks.grounding import box_point
from sif_ray.evaluate.benchmarks.item import Item, Reply
from sif_ray.evaluate.measure import sample_all

# An image of 200 x 100 px: the padded square has a side of 200, 50 px are added above and below.
WIDE, TARGET = (200, 100), (20, 0, 120, 40)
IN_IMAGE = (0.1, 0.0, 0.6, 0.4)
IN_SQUARE = (0.1, 0.25, 0.6, 0.45)  # (0 + 50) / 200, (40 + 50) / 200


def scored(text: str, size=WIDE, target=TARGET) -> tuple[float, float]:
    found = box_point(Reply(Item("0", "x", "a.jpg", "?", boxes_xyxy_px=(target,), width=size[0], height=size[1]), text))
    assert found.strict[1] == found.published[1] == 1
    return found.strict[0], found.published[0]


def test_each_convention_wants_its_own_frame():
    assert scored(output("x", IN_IMAGE)) == (1, 0)
    assert scored(output("x", IN_SQUARE)) == (0, 1)


def test_frames_agree_on_a_square_image():
    assert scored(output("x", (0.1, 0.1, 0.6, 0.6)), (100, 100), (10, 10, 60, 60)) == (1, 1)


def test_an_odd_padding_is_rounded_down():
    # 100 x 51 px: (100 - 51) // 2 = 24 px above. A box of 100 x 2 px is moved out of reach by one pixel more.
    assert scored(output("x", (0, 0.24, 1, 0.26)), (100, 51), (0, 0, 100, 2)) == (0, 1)
    assert scored(output("x", (0, 0.25, 1, 0.27)), (100, 51), (0, 0, 100, 2)) == (0, 0)  # IoU 1/3


def test_one_half_is_not_enough():
    """IoU is exactly 1/2 with a box of twice the area."""
    half = output("x", (0, 0, 1, 1))
    assert scored(half, (100, 100), (0, 0, 50, 100)) == (0, 0)
    assert scored(half, (100, 100), (0, 0, 51, 100)) == (1, 1)


def test_several_last_boxes_are_their_hull_strictly_and_none_as_published():
    corners = ((0.1, 0.0, 0.2, 0.1), (0.5, 0.3, 0.6, 0.4))
    assert scored(output("x", *corners)) == (1, 0)
    assert scored(output("x", *corners), (100, 100), (10, 0, 60, 40)) == (1, 0)


@pytest.mark.parametrize(
    "text", ["", "<answer>x</answer>", output("x").replace("<think>", "<think><area>[]</area>"), "<area>x</area>"]
)
def test_no_box_is_wrong_in_both(text):
    assert scored(text) == (0, 0)


def naive_iou(a, b) -> Fraction:
    def overlap(low_a, high_a, low_b, high_b):
        return max(Fraction(0), min(high_a, high_b) - max(low_a, low_b))

    shared = overlap(a[0], a[2], b[0], b[2]) * overlap(a[1], a[3], b[1], b[3])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return shared / (sum(areas) - shared)


SIDES = st.integers(2, 400)


@st.composite
def situations(draw):
    """Size of an image, a true box in it in pixels and a box in thousandths."""
    width, height = draw(SIDES), draw(SIDES)
    truth = []
    for side in (width, height):
        low = draw(st.integers(0, side - 1))
        truth.append((low, draw(st.integers(low + 1, side))))
    guess = [sorted(draw(st.lists(st.integers(0, 1000), min_size=2, max_size=2, unique=True))) for _ in range(2)]
    (x1, x2), (y1, y2) = truth
    (u1, u2), (v1, v2) = guess
    return (width, height), (x1, y1, x2, y2), (u1, v1, u2, v2)


@given(situations())
def test_both_frames_against_exact_arithmetic(situation):
    (width, height), truth, thousandths = situation
    guess = [Fraction(number, 1000) for number in thousandths]
    strict = naive_iou([g * side for g, side in zip(guess, (width, height) * 2, strict=True)], truth)
    side = max(width, height)
    pads = ((side - width) // 2, (side - height) // 2) * 2
    published = naive_iou([g * side for g in guess], [Fraction(t + pad) for t, pad in zip(truth, pads, strict=True)])
    found = scored(output("x", [number / 1000 for number in thousandths]), (width, height), truth)
    for value, iou in zip(found, (strict, published), strict=True):
        if abs(iou - Fraction(1, 2)) > Fraction(1, 10**9):  # at one half itself the last bit decides
            assert value == (iou > Fraction(1, 2))


@needs_samples
@pytest.mark.parametrize("path", sorted(SAMPLES.glob("viscot/benchmark_det/*.jsonl")), ids=lambda path: path.stem)
def test_the_true_boxes_of_real_rows(path):
    """The numbers of Visual-CoT's own question files are right as published, true image fractions are strictly."""
    questions = json.loads((path.parents[1] / f"benchmark/{path.stem}.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    as_stored = [output("x", json.loads(row["conversations"][1]["value"])) for row in questions]
    fractions = [
        output("x", [value / side for value, side in zip(row["bbox"], (row["width"], row["height"]) * 2, strict=True)])
        for row in rows
    ]
    assert headline("viscot_det", replies(choose("viscot", path), path, as_stored))[1] >= 0.9  # 3 decimals: tiny boxes
    assert headline("viscot_det", replies(choose("viscot", path), path, fractions))[0] == 1


def test_splits_and_data_sets_count_alike_whatever_their_size(tmp_path):
    """Three rows right of three in one split, one of two in the other."""
    rows = [(TARGET, *WIDE)]
    boxes(tmp_path / "REC_refcoco_unc_val.jsonl", rows * 3)
    boxes(tmp_path / "REC_refcocog_umd_test.jsonl", rows * 2)
    right, wrong = output("x", IN_IMAGE), output("x", IN_SQUARE)
    found = replies(BENCHMARKS["refcoco"], tmp_path, [right, right, right, right, wrong])
    assert headline("refcoco", found) == (0.75, 0.25)
    assert headline("refcoco", found, "refcocog_umd_test") == (0.5, 0.5)


def test_visual_cot_averages_data_sets_and_names_their_groups(tmp_path):
    for name, num_rows in (("docvqa", 1), ("sroie", 3), ("gqa", 2), ("visual7w", 4)):
        boxes(tmp_path / f"{name}.jsonl", [(TARGET, *WIDE)] * num_rows, own_id="question_id")
    right, wrong = output("x", IN_IMAGE), output("x", IN_SQUARE)
    found = replies(BENCHMARKS["viscot_det"], tmp_path, [right, right, wrong, wrong, wrong, wrong])
    [measure] = BENCHMARKS["viscot_det"].measure(found)
    scores = {name: sampled.value for name, sampled in sample_all(measure, 10, 0)["strict"].items()}
    assert scores == pytest.approx(
        {"overall": (1 + 1 / 3 + 0) / 3, "Text": (1 + 1 / 3) / 2, "Reasoning": 0, "docvqa": 1, "sroie": 1 / 3, "gqa": 0}
    )


def test_an_answer_without_a_verdict_is_left_out_strictly_and_zero_as_published(tmp_path):
    first, second = replies(BENCHMARKS["viscot"], viscot(tmp_path), ["", ""])
    found = [Reply(first.item, output("A cup", IN_IMAGE), 0.5), Reply(second.item, output("?", IN_IMAGE), None)]
    assert headline("viscot", found) == (0.5, 0.25)


def test_several_last_boxes_void_the_answer_as_published(tmp_path):
    first, second = replies(BENCHMARKS["viscot"], viscot(tmp_path), ["", ""])
    found = [
        Reply(first.item, output("A cup", IN_IMAGE, IN_SQUARE), 1.0),
        Reply(second.item, output("A cup", IN_IMAGE), 1.0),
    ]
    assert headline("viscot", found) == (1, 0.5)
