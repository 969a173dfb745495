"""The PNGs that are written here, with Pillow as their reader and `method.depth_code` as the measure of their depth."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from sif_ray.depth.encoding import depth_png, gray_png, read_gray
from sif_ray.method.depth_code import DepthError, decode, encode

depth_maps = hnp.arrays(np.float64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.floats(0, 1))


@given(depth_maps)
def test_both_pngs_are_what_any_reader_makes_of_them(depth_rel):
    with Image.open(io.BytesIO(depth_png(depth_rel))) as colour:
        assert np.array_equal(np.asarray(colour.convert("RGB")), encode(depth_rel))
    with Image.open(io.BytesIO(gray_png(depth_rel))) as gray:
        assert gray.mode == "L"
        np.testing.assert_allclose(np.asarray(gray) / 255, decode(encode(depth_rel)), atol=1e-12)  # 0 = near in both


@given(depth_maps)
def test_gray_depth_gives_the_same_files_again(depth_rel):
    again = read_gray(gray_png(depth_rel))
    np.testing.assert_allclose(again, depth_rel, atol=0.5 / 255 + 1e-12)
    assert (gray_png(again), depth_png(again)) == (gray_png(depth_rel), depth_png(depth_rel))


def test_smooth_depth_is_packed_as_tightly_as_pillow_packs_it():
    y, x = np.mgrid[0:240, 0:320] / 320
    depth_rel = (np.sin(5 * x) * np.cos(7 * y) + 1) / 2
    buffer = io.BytesIO()
    Image.open(io.BytesIO(gray_png(depth_rel))).save(buffer, "PNG", compress_level=1)
    assert len(gray_png(depth_rel)) < 1.1 * len(buffer.getvalue())
    assert len(gray_png(depth_rel)) < 0.7 * len(zlib.compress((depth_rel * 255).astype(np.uint8).tobytes(), 1))


@pytest.mark.parametrize("bad", [np.full((2, 2), 1.01), np.full((2, 2), np.nan), np.zeros(4), np.zeros((0, 3))])
def test_what_is_no_depth_is_not_written(bad):
    for write in (depth_png, gray_png):
        with pytest.raises(DepthError):
            write(bad)
