from __future__ import annotations

import math
from itertools import permutations
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sif_ray.method.boxes import (
    FULL_IMAGE,
    Box,
    BoxError,
    _few_areas,
    _many_areas,
    hierarchical_iou,
    hull,
    image_to_padded_square,
    ingest_padded_square,
    iou,
    is_box,
    norm_to_pixels,
    padded_square_to_image,
    pair_iou,
    pixels_to_norm,
    union_iou,
)

GRID = 16


def grid_boxes(size: int = GRID) -> st.SearchStrategy[Box]:
    """Boxes whose corners lie on a grid, so that a raster measures them exactly."""
    side = st.tuples(st.integers(0, size), st.integers(0, size)).filter(lambda s: s[0] != s[1]).map(sorted)
    return st.tuples(side, side).map(lambda s: (s[0][0] / size, s[1][0] / size, s[0][1] / size, s[1][1] / size))


def raster(boxes: list[Box]) -> np.ndarray:
    cells = np.zeros((GRID, GRID), dtype=bool)
    for x1, y1, x2, y2 in boxes:
        cells[round(y1 * GRID) : round(y2 * GRID), round(x1 * GRID) : round(x2 * GRID)] = True
    return cells


BOX_SETS = st.lists(grid_boxes(), max_size=5)


def test_worked_vectors() -> None:
    assert hierarchical_iou([[0.1, 0.2, 0.3, 0.4]], [[0.1, 0.2, 0.3, 0.4]]) == 1.0
    assert hierarchical_iou([[0, 0, 1, 1]], [[0.25, 0.25, 0.75, 0.75]]) == 0.25
    two, one = [[0.1, 0.1, 0.4, 0.4], [0.2, 0.2, 0.5, 0.5]], [[0.1, 0.1, 0.5, 0.5]]
    # each of the two is 0.09 of the target's 0.16; together they miss two corners of 0.01: 0.14 / 0.16
    assert pair_iou(two, one) == pytest.approx(0.5625)
    assert union_iou(two, one) == pytest.approx(0.875)
    assert hierarchical_iou(two, one) == pytest.approx(0.71875)


def test_matching_is_optimal_rather_than_greedy() -> None:
    P = [[0.0, 0.0, 0.4, 1.0], [0.0, 0.0, 0.2, 1.0]]
    G = [[0.0, 0.0, 0.3, 1.0], [0.3, 0.0, 0.4, 1.0]]
    # (P0,G0) = 3/4, (P0,G1) = 1/4, (P1,G0) = 2/3, (P1,G1) = 0: crossed 1/4 + 2/3 beats straight 3/4
    assert pair_iou(P, G) == pytest.approx((1 / 4 + 2 / 3) / 2)


def test_surplus_boxes_cost_only_the_global_half() -> None:
    target = [[0.0, 0.0, 0.5, 0.5]]
    surplus = [*target, [0.5, 0.5, 1.0, 1.0]]
    assert pair_iou(surplus, target) == 1.0
    assert union_iou(surplus, target) == 0.5
    assert hierarchical_iou(surplus, target) == 0.75


def test_empty_sets() -> None:
    some = [[0.1, 0.1, 0.2, 0.2]]
    for measure in (union_iou, pair_iou, hierarchical_iou):
        assert measure([], []) == 1.0
        assert measure(some, []) == 0.0
        assert measure([], some) == 0.0


def test_boxes_without_area_are_left_out_of_the_union_only() -> None:
    target, inverted = [[0.1, 0.1, 0.5, 0.5]], [0.4, 0.4, 0.3, 0.3]
    assert union_iou([*target, inverted], target) == 1.0
    assert iou(inverted, inverted) == 0.0
    assert hierarchical_iou([inverted], target) == 0.0
    assert hierarchical_iou([inverted], []) == 0.5  # union: both empty; pairs: one empty


def test_disjoint_and_touching_boxes_are_exactly_zero() -> None:
    assert hierarchical_iou([[0.1, 0.1, 0.2, 0.2]], [[0.2, 0.1, 0.3, 0.2]]) == 0.0
    assert hierarchical_iou([[0.1, 0.1, 0.2, 0.2]], [[0.7, 0.7, 0.8, 0.8]]) == 0.0


@given(BOX_SETS, BOX_SETS)
def test_union_iou_equals_the_raster(P: list[Box], G: list[Box]) -> None:
    a, b = raster(P), raster(G)
    expected = (a & b).sum() / (a | b).sum() if (a | b).any() else 1.0
    assert union_iou(P, G) == pytest.approx(expected, abs=1e-12)


@given(st.lists(grid_boxes(), min_size=1, max_size=5), st.lists(grid_boxes(), min_size=1, max_size=5))
def test_few_boxes_are_measured_as_many_are(P: list[Box], G: list[Box]) -> None:
    a, b = raster(P), raster(G)
    for areas in (_few_areas, _many_areas):
        assert areas(P, G) == pytest.approx(((a & b).sum() / GRID**2, (a | b).sum() / GRID**2), abs=1e-12)


@pytest.mark.parametrize("form", [tuple, list, np.array])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1.1e6, -1.1e6])
@pytest.mark.parametrize("place", range(4))
def test_coordinates_without_bounds_are_refused_in_every_form(form: Any, bad: float, place: int) -> None:
    box = [0.1, 0.2, 0.3, 0.4]
    assert iou(form(box), FULL_IMAGE) > 0
    box[place] = bad
    for measure in (lambda: iou(form(box), FULL_IMAGE), lambda: union_iou([form(box)], [FULL_IMAGE])):
        with pytest.raises(BoxError):
            measure()


@given(grid_boxes(), grid_boxes())
def test_iou_equals_the_raster(a: Box, b: Box) -> None:
    expected = (raster([a]) & raster([b])).sum() / (raster([a]) | raster([b])).sum()
    assert iou(a, b) == pytest.approx(expected, abs=1e-12)
    assert hierarchical_iou([a], [b]) == pytest.approx(expected, abs=1e-12)


@given(st.lists(grid_boxes(), min_size=1, max_size=4), st.lists(grid_boxes(), min_size=1, max_size=4))
def test_pair_iou_equals_the_best_of_all_matchings(P: list[Box], G: list[Box]) -> None:
    small, large = sorted((P, G), key=len)
    best = max(sum(iou(a, b) for a, b in zip(small, chosen, strict=True)) for chosen in permutations(large, len(small)))
    assert pair_iou(P, G) == pytest.approx(best / len(small))


@given(BOX_SETS, BOX_SETS, st.randoms(use_true_random=False))
def test_hierarchical_iou_is_symmetric_bounded_and_blind_to_order(P: list[Box], G: list[Box], random: Random) -> None:
    value = hierarchical_iou(P, G)
    assert 0 <= value <= 1
    assert hierarchical_iou(G, P) == pytest.approx(value)
    shuffled = random.sample(P, len(P))
    assert hierarchical_iou(shuffled, G) == pytest.approx(value)
    assert hierarchical_iou(P, P) == pytest.approx(1.0)


def test_arbitrary_corners_against_sampling() -> None:
    rng = np.random.default_rng(3)
    corners = np.sort(rng.random((7, 2, 2)), axis=1).reshape(7, 4)
    P, G = corners[:4], corners[4:]
    points = rng.random((200_000, 2))

    def covered(boxes: np.ndarray) -> np.ndarray:
        inside = [((points >= box[:2]) & (points < box[2:])).all(axis=1) for box in boxes]
        return np.any(inside, axis=0)

    expected = (covered(P) & covered(G)).sum() / (covered(P) | covered(G)).sum()
    assert union_iou(P, G) == pytest.approx(expected, abs=0.01)


def test_many_boxes_are_measured_in_strips_without_changing_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    boxes = np.sort(rng.random((120, 2, 2)), axis=1).reshape(120, 4).tolist()
    whole = union_iou(boxes[:60], boxes[60:])
    monkeypatch.setattr("sif_ray.method.boxes._STRIP_CELLS", 1000)
    assert union_iou(boxes[:60], boxes[60:]) == pytest.approx(whole)


@pytest.mark.parametrize(
    "bad",
    [
        None,
        5,
        "abcd",
        [0.1, 0.2, 0.3, 0.4],  # one box where a list of boxes is due
        [[0.1, 0.2, 0.3]],
        [[0.1, 0.2, 0.3, math.nan]],
        [[0.1, 0.2, 0.3, math.inf]],
        [[0.1, 0.2, 0.3, 1e300]],
        [[0.1, 0.2, 0.3, 10**400]],
        [["0", "0", "1", "1"]],
        [[False, False, True, True]],
        [[[0], [0], [1], [1]]],
        np.array(3.0),
        {(0.0, 0.0, 1.0, 1.0)},
    ],
)
def test_what_is_no_list_of_boxes_is_refused(bad: object) -> None:
    good = [[0.0, 0.0, 1.0, 1.0]]
    for measure in (union_iou, pair_iou, hierarchical_iou):
        with pytest.raises(BoxError):
            measure(bad, good)
        with pytest.raises(BoxError):
            measure(good, bad)


def test_arrays_are_boxes_too() -> None:
    assert hierarchical_iou(np.array([[0, 0, 1, 1]], dtype=np.float32), np.array([[0.0, 0.0, 0.5, 1.0]])) == 0.5


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (FULL_IMAGE, True),
        ([0, 0, 1, 1], True),
        (np.array([0.1, 0.1, 0.2, 0.2], dtype=np.float32), True),
        ((0.2, 0.1, 0.1, 0.3), False),
        ((0.1, 0.1, 0.1, 0.3), False),
        ((-0.1, 0.1, 0.2, 0.3), False),
        ((0.1, 0.1, 1.1, 0.3), False),
        ((0.1, 0.1, math.nan, 0.3), False),
        ((True, True, 1, 1), False),
        ((0.1, 0.1, 0.2), False),
        ("0011", False),
        (None, False),
    ],
)
def test_is_box(value: object, expected: bool) -> None:
    assert is_box(value) is expected


def test_hull() -> None:
    assert hull([(0.1, 0.5, 0.2, 0.6), (0.3, 0.2, 0.4, 0.55)]) == (0.1, 0.2, 0.4, 0.6)
    with pytest.raises(BoxError, match="empty"):
        hull([])


def test_padded_square_worked_by_hand() -> None:
    # 640 x 480: 80 px of padding on top, so y = 80/640 is the image's upper edge and y = 560/640 its lower
    assert padded_square_to_image((0.0, 0.125, 1.0, 0.875), 640, 480) == pytest.approx(FULL_IMAGE)
    # px (64, 120, 320, 360) -> y + 80 = 200, 440
    assert image_to_padded_square((0.1, 0.25, 0.5, 0.75), 640, 480) == pytest.approx((0.1, 200 / 640, 0.5, 440 / 640))
    # odd difference: (101 - 50) // 2 = 25 px, left for a tall image
    assert image_to_padded_square((0.0, 0.0, 1.0, 1.0), 50, 101) == pytest.approx((25 / 101, 0.0, 75 / 101, 1.0))


@given(grid_boxes(), st.integers(1, 5000), st.integers(1, 5000))
def test_frames_round_trip(box: Box, width: int, height: int) -> None:
    padded = image_to_padded_square(box, width, height)
    assert is_box(padded)
    assert padded_square_to_image(padded, width, height) == pytest.approx(box, abs=1e-9)
    assert pixels_to_norm(norm_to_pixels(box, width, height), width, height) == pytest.approx(box, abs=1e-9)


@given(grid_boxes(), st.integers(1, 2000))
def test_square_images_need_no_conversion(box: Box, side: int) -> None:
    assert image_to_padded_square(box, side, side) == pytest.approx(box)


def test_ingest_by_profile() -> None:
    box = (0.1, 0.3, 0.5, 0.6)
    assert ingest_padded_square(box, 640, 480, "published") == box
    # y: 0.3 * 640 - 80 = 112 px and 0.6 * 640 - 80 = 304 px of 480
    assert ingest_padded_square(box, 640, 480, "corrected") == pytest.approx((0.1, 112 / 480, 0.5, 304 / 480))


def test_boxes_are_clipped_and_refused_if_nothing_is_left() -> None:
    assert pixels_to_norm((-5, 10, 50, 120), 100, 100) == (0.0, 0.1, 0.5, 1.0)
    with pytest.raises(BoxError, match="covers nothing"):
        pixels_to_norm((110, 10, 150, 20), 100, 100)
    with pytest.raises(BoxError, match="covers nothing"):
        padded_square_to_image((0.1, 0.0, 0.5, 0.1), 640, 480)  # in the padding


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (2.5, 5), (True, 5), (math.nan, 5), ("5", 5)])
def test_impossible_sizes(size: tuple) -> None:
    for convert in (pixels_to_norm, norm_to_pixels, padded_square_to_image, image_to_padded_square):
        with pytest.raises(BoxError, match="pixels"):
            convert((0.1, 0.1, 0.5, 0.5), *size)


@settings(max_examples=150)
@given(
    st.lists(
        st.lists(st.floats() | st.integers() | st.booleans() | st.none() | st.text(max_size=2), max_size=5), max_size=4
    )
)
def test_anything_is_measured_or_refused(boxes: list) -> None:
    try:
        value = hierarchical_iou(boxes, [FULL_IMAGE])
    except BoxError:
        return
    assert 0 <= value <= 1
