from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sif_ray.method.boxes import FULL_IMAGE, Box, BoxError, hull, iou, is_box
from sif_ray.method.expansion import (
    distractor,
    expand,
    forward_frames,
    merge_overlapping,
    reverse_expansion,
)
from sif_ray.method.profile import CORRECTED

sides = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted).filter(lambda s: s[1] - s[0] > 1e-6)
boxes = st.tuples(sides, sides).map(lambda s: (s[0][0], s[1][0], s[0][1], s[1][1]))
sizes = st.integers(1, 4000)
profiles = st.sampled_from(["published", "corrected"])


def contains(outer: Box, inner: Box) -> bool:
    return outer[0] <= inner[0] and outer[1] <= inner[1] and inner[2] <= outer[2] and inner[3] <= outer[3]


def test_published_step_worked_by_hand() -> None:
    # rem_x = 1 - .2 - .3 = .5, rem_y = 1 - .6 - .7 = -.3; step = max(.5 * 200 / 5, -6, 1) = 20 px on both axes
    assert expand([(0.2, 0.6, 0.3, 0.7)], 200, 100, "published") == [pytest.approx((0.1, 0.4, 0.4, 0.9))]
    # a centred box has nothing "remaining": 1 px
    assert expand([(0.4, 0.4, 0.6, 0.6)], 200, 100, "published") == [pytest.approx((0.395, 0.39, 0.605, 0.61))]
    # several boxes: the largest x1 and the smallest x2 decide: rem_x = 1 - .5 - .2 = .3, rem_y = 1 - .1 - .2 = .7
    assert expand([(0.1, 0.1, 0.2, 0.2), (0.5, 0.1, 0.6, 0.2)], 100, 100, "published") == [
        pytest.approx((0.0, 0.0, 0.34, 0.34)),
        pytest.approx((0.36, 0.0, 0.74, 0.34)),
    ]


def test_corrected_step_worked_by_hand() -> None:
    # a fifth of 0.5 / 0.3 to the left and on top, at least 0.05 to the right (0.1) and below (0.2)
    assert expand([(0.5, 0.3, 0.9, 0.8)], 640, 480, "corrected") == [pytest.approx((0.4, 0.24, 0.95, 0.85))]


def test_merging_repeats_until_stable() -> None:
    a, b, c = (0.0, 0.0, 0.3, 0.3), (0.5, 0.0, 0.8, 0.3), (0.2, 0.2, 0.6, 0.4)
    # c bridges a and b; the hull then swallows d, which overlapped none of them
    d = (0.65, 0.32, 0.7, 0.38)
    assert merge_overlapping([d, a, b, c]) == [(0.0, 0.0, 0.8, 0.4)]
    assert merge_overlapping([a, (0.3, 0.0, 0.4, 0.3)]) == [a, (0.3, 0.0, 0.4, 0.3)]  # touching is not overlapping


@given(st.lists(boxes, min_size=1, max_size=6))
def test_merged_boxes_are_apart_and_cover_their_parts(parts: list[Box]) -> None:
    merged = merge_overlapping(parts)
    assert all(iou(a, b) == 0 for i, a in enumerate(merged) for b in merged[:i])
    assert all(any(contains(box, part) for box in merged) for part in parts)
    assert hull(merged) == hull(parts)


def test_frames_worked_by_hand() -> None:
    quiet = next(seed for seed in range(50) if np.random.default_rng(seed).random() >= 0.5)
    one = forward_frames([(0.2, 0.6, 0.3, 0.7)], 200, 100, np.random.default_rng(quiet), "published")
    assert one == [[FULL_IMAGE], [(0.1, 0.4, 0.4, 0.9)], [(0.2, 0.6, 0.3, 0.7)]]
    pair = [(0.1, 0.1, 0.2, 0.2), (0.7, 0.7, 0.8, 0.8)]
    several = forward_frames(pair, 640, 480, np.random.default_rng(quiet), "corrected")
    first = [(0.05, 0.05, 0.36, 0.36), (0.56, 0.56, 0.85, 0.85)]
    assert several == [[FULL_IMAGE], [hull(first)], first, pair]


@given(st.lists(boxes, min_size=1, max_size=5), sizes, sizes, st.integers(0, 2**32), profiles)
@example([(0.0, 0.25, 1.0, 0.3125)], 1, 3, 0, "published")
def test_frames_keep_their_promises(evidence: list[Box], width: int, height: int, seed: int, profile: str) -> None:
    frames = forward_frames(evidence, width, height, np.random.default_rng(seed), profile)
    assert frames == reverse_expansion(evidence, width, height, np.random.default_rng(seed), profile)[::-1]
    assert frames[0] == [FULL_IMAGE]
    assert 1 <= len(frames) <= 5
    assert all(frames)
    for box in (box for frame in frames for box in frame):
        assert is_box(box)
        assert all(round(value, 3) == value for value in box)

    # Whole pixels: half of one by rounding, and a whole one more where a box would be empty.
    tolerance_x, tolerance_y = (
        0.002 + (1.5 / width if profile == "published" else 0),
        0.002 + (1.5 / height if profile == "published" else 0),
    )
    for given_box, shown in zip(evidence, frames[-1], strict=True):
        for k, tolerance in enumerate((tolerance_x, tolerance_y) * 2):
            assert abs(given_box[k] - shown[k]) <= tolerance
    if profile == "published":
        assert len(frames) >= 3
    else:
        assert all(a != b for a, b in pairwise(frames))
    if len(frames) >= 2:
        first = frames[-2]
        assert all(any(contains(box, part) for box in first) for part in frames[-1])


@given(boxes, st.integers(0, 2**32))
def test_a_distractor_is_a_box_of_bounded_size(box: Box, seed: int) -> None:
    place = distractor(box, np.random.default_rng(seed))
    assert -1e-9 <= place[0] < place[2] <= 1 + 1e-9
    assert -1e-9 <= place[1] < place[3] <= 1 + 1e-9
    assert place[2] - place[0] <= 1.56 * (box[2] - box[0]) + 1e-9


def test_small_boxes_get_distractors_in_corners_half_of_the_time() -> None:
    rng = np.random.default_rng(7)
    with_look, corners = 0, set()
    for _ in range(600):
        frames = forward_frames([(0.45, 0.45, 0.55, 0.55)], 500, 500, rng, "published")
        if len(frames) == 4:
            with_look += 1
            (look,) = frames[1]
            assert iou(look, frames[2][0]) < 0.001
            corners.add((look[0] == 0, look[1] == 0))
    assert 240 <= with_look <= 360  # 5 standard deviations around 300
    assert len(corners) == 4


def test_large_boxes_get_none() -> None:
    rng = np.random.default_rng(1)
    assert all(len(forward_frames([(0.1, 0.1, 0.9, 0.9)], 100, 100, rng)) == 3 for _ in range(30))


def test_corner_places_become_rarer_with_size_as_measured_on_the_released_code() -> None:
    rng = np.random.default_rng(5)

    def share(side: float) -> float:
        hits = 0
        for _ in range(2000):
            x, y = rng.random(2) * (1 - side)
            place = distractor((x, y, x + side, y + side), rng)
            at_x = place[0] == 0 or math.isclose(place[2], 1)
            at_y = place[1] == 0 or math.isclose(place[3], 1)
            hits += at_x and at_y and iou(place, (x, y, x + side, y + side)) == 0
        return hits / 2000

    assert share(0.2) > 0.98
    assert share(0.3) == pytest.approx(0.83, abs=0.05)
    assert share(0.4) == pytest.approx(0.26, abs=0.05)


def test_evidence_that_fills_the_image() -> None:
    rng = np.random.default_rng(0)
    assert forward_frames([FULL_IMAGE], 64, 48, rng, "corrected") == [[FULL_IMAGE]]
    assert forward_frames([FULL_IMAGE], 64, 48, rng, "published") == [[FULL_IMAGE]] * 3
    keeps = dataclasses.replace(CORRECTED, name="keeps", repeated_frames_kept=True)
    assert len(forward_frames([(0.01, 0.01, 0.99, 0.99)], 64, 48, rng, keeps)) == 3
    assert len(forward_frames([(0.01, 0.01, 0.99, 0.99)], 64, 48, rng, "corrected")) == 2


def test_same_seed_same_frames() -> None:
    a, b = (
        forward_frames([(0.1, 0.2, 0.3, 0.4)], 640, 480, np.random.default_rng([3, 1]), "corrected") for _ in range(2)
    )
    assert a == b


@pytest.mark.parametrize(
    ("bad", "width", "height"),
    [
        ([], 10, 10),
        (None, 10, 10),
        ([(0.5, 0.1, 0.4, 0.2)], 10, 10),
        ([(0.1, 0.1, 0.4, math.nan)], 10, 10),
        ([(0.1, 0.1, 0.4, 1.2)], 10, 10),
        ((0.1, 0.1, 0.4, 0.5), 10, 10),
        ([(0.1, 0.1, 0.4, 0.5)], 0, 10),
        ([(0.1, 0.1, 0.4, 0.5)], 10, 2.5),
    ],
)
def test_bad_input_is_refused(bad: object, width: object, height: object) -> None:
    for profile in ("published", "corrected"):
        with pytest.raises(BoxError):
            forward_frames(bad, width, height, np.random.default_rng(0), profile)
