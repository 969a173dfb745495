from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sif_ray.method.boxes import BoxError
from sif_ray.method.depth_code import (
    CONSTANT_DEPTH,
    PALETTE_RGB,
    DepthError,
    box_mean,
    decode,
    encode,
    from_disparity,
)

depth_maps = hnp.arrays(np.float64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.floats(0, 1))


def test_the_palette_is_matplotlibs() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    assert np.array_equal(PALETTE_RGB, matplotlib.colormaps["Spectral_r"](np.arange(256), bytes=True)[:, :3])
    assert len(np.unique(PALETTE_RGB, axis=0)) == 256


def test_near_is_red_and_far_is_blue() -> None:
    ((near, far),) = encode(np.array([[0.0, 1.0]]))
    assert near.tolist() == [158, 1, 66]
    assert far.tolist() == [94, 79, 162]


def test_from_disparity_worked_by_hand() -> None:
    assert from_disparity([[2.0, 4.0, 10.0]]).tolist() == [[1.0, 0.75, 0.0]]
    assert from_disparity(np.full((2, 3), 7)).tolist() == [[CONSTANT_DEPTH] * 3] * 2
    assert from_disparity([[-1e308, 0.0, 1e308]]).tolist() == [[1.0, 0.5, 0.0]]
    assert from_disparity([[0.0, 5e-324]]).tolist() == [[1.0, 0.0]]


@given(hnp.arrays(np.float64, (3, 4), elements=st.floats(-1e300, 1e300)))
def test_from_disparity_is_a_depth_map_in_reverse_order(disparity: np.ndarray) -> None:
    depth = from_disparity(disparity)
    assert ((depth >= 0) & (depth <= 1)).all()
    order = np.argsort(disparity, axis=None)
    assert (np.diff(depth.ravel()[order]) <= 0).all()


@given(depth_maps)
def test_colours_keep_depth_to_half_a_level(depth: np.ndarray) -> None:
    rgb = encode(depth)
    assert rgb.shape == (*depth.shape, 3)
    assert rgb.dtype == np.uint8
    decoded = decode(rgb)
    assert np.abs(decoded - depth).max() <= 0.5 / 255 + 1e-12
    assert np.array_equal(encode(decoded), rgb)


def test_every_palette_colour_decodes_exactly() -> None:
    assert np.array_equal(decode(PALETTE_RGB[None])[0], 1 - np.arange(256) / 255)


def test_other_colours_decode_to_the_nearest_one() -> None:
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)
    distance = ((rgb[:, :, None].astype(int) - PALETTE_RGB.astype(int)) ** 2).sum(axis=-1)
    found = np.rint((1 - decode(rgb)) * 255).astype(int)
    chosen = np.take_along_axis(distance, found[..., None], axis=-1)[..., 0]
    assert np.array_equal(chosen, distance.min(axis=-1))


def test_no_pseudo_colour_image_passes_for_gray() -> None:
    spread = PALETTE_RGB.max(axis=1).astype(int) - PALETTE_RGB.min(axis=1)
    assert spread.min() > 2


def test_polarity_of_gray_images() -> None:
    gray = np.array([[0, 51, 255]], dtype=np.uint8)
    assert decode(gray).tolist() == [[1.0, 0.8, 0.0]]
    assert decode(gray, "published").tolist() == [[0.0, 0.2, 1.0]]
    three = np.repeat(gray[..., None], 3, axis=2)
    assert np.array_equal(decode(three), decode(gray))
    tinted = three + np.array([0, 0, 2], dtype=np.uint8) * (three < 250)
    assert decode(tinted)[0, 1] == pytest.approx(1 - (51 + 51 + 53) / 3 / 255)


def naive_mean(depth: np.ndarray, box: tuple[float, float, float, float]) -> float | None:
    height, width = depth.shape
    inside = [
        float(depth[y, x])
        for y in range(height)
        for x in range(width)
        if math.floor(box[0] * width) <= x < math.ceil(box[2] * width)
        and math.floor(box[1] * height) <= y < math.ceil(box[3] * height)
    ]
    return math.fsum(inside) / len(inside) if inside else None


@given(depth_maps, st.tuples(*[st.floats(-0.5, 1.5)] * 4))
def test_box_mean_equals_the_naive_loop(depth: np.ndarray, box: tuple[float, float, float, float]) -> None:
    expected = naive_mean(depth, box)
    if expected is None:
        with pytest.raises(BoxError, match="no pixel"):
            box_mean(depth, box)
    else:
        assert box_mean(depth, box) == pytest.approx(expected, abs=1e-12)


def test_box_mean_rounds_edges_outwards() -> None:
    depth = np.arange(16, dtype=np.float64).reshape(4, 4) / 15
    # x 0.3..0.6 of 4 px touches columns 1 and 2, y 0.5..0.75 is row 2: (9 + 10) / 2 / 15
    assert box_mean(depth, (0.3, 0.5, 0.6, 0.75)) == pytest.approx(9.5 / 15)


@pytest.mark.parametrize(
    "bad",
    [
        np.full((2, 2), np.nan),
        np.full((2, 2), np.inf),
        np.zeros((2, 2, 3)),
        np.zeros(4),
        np.zeros((0, 3)),
        np.array([["a"]]),
        np.array([[True]]),
        [[1.0, 2.0], [1.0]],
        None,
        3,
    ],
)
def test_bad_maps_are_refused(bad: object) -> None:
    for function in (from_disparity, encode, lambda depth: box_mean(depth, (0, 0, 1, 1))):
        with pytest.raises(DepthError):
            function(bad)


@pytest.mark.parametrize("bad", [np.full((2, 2), 1.01), np.full((2, 2), -0.01)])
def test_depth_outside_the_unit_interval_is_not_encoded(bad: np.ndarray) -> None:
    with pytest.raises(DepthError, match="0 = near"):
        encode(bad)


@pytest.mark.parametrize("box", [(0, 0, 1), (0, 0, 1, math.nan), (0.5, 0, 0.4, 1), ("0", 0, 1, 1), None, 3])
def test_bad_boxes_are_refused(box: object) -> None:
    with pytest.raises(BoxError):
        box_mean(np.zeros((2, 2)), box)


@pytest.mark.parametrize(
    "bad",
    [np.zeros((2, 2, 3)), np.zeros((2, 2, 4), np.uint8), np.zeros((0, 2, 3), np.uint8), np.zeros(3, np.uint8), None],
)
def test_bad_images_are_refused(bad: object) -> None:
    with pytest.raises(DepthError):
        decode(bad)
