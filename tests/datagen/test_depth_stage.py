"""The depth stage on lists of drafts: what it adds, what it refuses, and that a picture's depth is nobody else's."""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sif_ray.config import GenerateConfig
from sif_ray.datagen.depth_stage import AddDepth, to_image_frame
from sif_ray.datagen.drafts import Draft, drafts_from_table, drafts_to_table
from sif_ray.depth.encoding import depth_png, read_gray
from sif_ray.depth.estimator import DepthEstimator
from sif_ray.method import depth_code
from sif_ray.method.boxes import BoxError, image_to_padded_square
from sif_ray.records import Sample
from sif_ray.toyworld.render import png, render
from sif_ray.toyworld.scenes import make_scene

SCENES = [png(render(make_scene(seed)).rgb) for seed in range(3)]  # 112 x 112 px
BOX = (0.1, 0.2, 0.5, 0.6)


def draft(image: bytes = SCENES[0], boxes=(BOX,), frame: str = "image", **fields) -> Draft:
    sample = Sample("a-1", "a", "toy", "train", "Which?", "", "red ball", tuple(boxes), 0, 0, image, b"", "", frame)
    return Draft(replace(sample, **fields), names=("red ball",) * len(boxes))


@pytest.fixture(scope="module")
def add_depth() -> AddDepth:
    return AddDepth(GenerateConfig())


def photo(size: tuple[int, int] = (60, 40), form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize(size).convert("RGB").save(buffer, form, **options)
    return buffer.getvalue()


def test_depth_is_the_estimate_in_gray_and_in_colour(add_depth):
    (found,) = add_depth([draft()])
    assert (found.reasons, found.names) == ((), ("red ball",))
    assert (found.sample.width, found.sample.height, found.sample.depth_source) == (112, 112, "estimated:tiny_depth")
    assert (found.sample.image, found.sample.boxes) == (SCENES[0], (BOX,))
    (expected,) = DepthEstimator("toy").estimate([Image.open(io.BytesIO(SCENES[0]))])
    with Image.open(io.BytesIO(found.depth_gray)) as gray:
        assert gray.mode == "L"
        np.testing.assert_allclose(np.asarray(gray) / 255, expected, atol=0.5 / 255 + 1e-6)  # 0 = near
    with Image.open(io.BytesIO(found.sample.depth_image)) as colour:
        np.testing.assert_allclose(
            depth_code.decode(np.asarray(colour.convert("RGB"))), read_gray(found.depth_gray), atol=1e-12
        )


def test_equal_pictures_are_estimated_once_and_a_refused_draft_is_left_alone(add_depth, monkeypatch):
    prepared = []
    prepare = DepthEstimator.prepare
    monkeypatch.setattr(DepthEstimator, "prepare", lambda self, rgb: prepared.append(rgb) or prepare(self, rgb))
    pictures = [photo((50, 50)), photo((51, 50)), photo((50, 50))]
    refused = draft(b"never opened").refused("image_missing")
    found = add_depth([draft(pictures[0]), refused, *(draft(picture) for picture in pictures[1:])])
    assert len(prepared) == 2
    assert found[1] is refused
    assert found[0].depth_gray == found[3].depth_gray != found[2].depth_gray
    add_depth([draft(picture) for picture in pictures])  # in another shard
    assert len(prepared) == 2


def test_depth_does_not_depend_on_the_other_pictures_of_the_shard(add_depth):
    """Else a restart, whose cache knows other pictures, would write other bytes."""
    together = AddDepth(GenerateConfig())([draft(scene) for scene in SCENES])
    for scene, expected in zip(SCENES, together, strict=True):
        assert AddDepth(GenerateConfig())([draft(scene)]) == [expected]
    assert add_depth([draft(scene) for scene in SCENES[::-1]]) == together[::-1]


def test_the_drafts_survive_their_table(add_depth):
    found = add_depth([draft(), draft(b"")])
    assert drafts_from_table(drafts_to_table(found)) == found


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ({"image": b"no picture"}, ("image_unreadable",)),
        ({"width": 113, "height": 112}, ("image_size_mismatch",)),
        ({"boxes": ()}, ("boxes_missing",)),
        ({"boxes": (BOX, (0.5, 0.2, 0.4, 0.6))}, ("boxes_invalid",)),
        ({"boxes": ((0.5, 0.2, 0.5, 0.6),)}, ("boxes_invalid",)),
        ({"boxes": ((0.5, 0.2, 1.1, 0.6),)}, ("boxes_invalid",)),
        ({"boxes": ((0.5, 0.2, math.nan, 0.6),)}, ("boxes_invalid",)),
        ({"boxes": ((0.5, 0.2, 0.6),)}, ("boxes_invalid",)),
        ({"boxes": ((200, 200, 300, 300),), "source_frame": "pixels"}, ("boxes_invalid",)),
        ({"depth_image": b"no depth", "depth_source": "measured"}, ("depth_unreadable",)),
        ({"depth_image": depth_png(np.zeros((112, 113))), "depth_source": "measured"}, ("depth_size_mismatch",)),
    ],
)
def test_a_bad_row_says_why_and_costs_no_other_row(add_depth, change, reasons):
    bad, good = add_depth([draft(**change), draft()])
    assert (bad.reasons, bad.depth_gray, good.reasons) == (reasons, b"", ())
    assert bad.sample.sample_id == "a-1"


def test_given_depth_is_kept(add_depth):
    depth_rel = np.linspace(0, 1, 112 * 112).reshape(112, 112)
    given_depth = depth_png(depth_rel)
    (found,) = add_depth([draft(depth_image=given_depth, depth_source="measured")])
    assert (found.sample.depth_image, found.sample.depth_source) == (given_depth, "measured")
    np.testing.assert_allclose(read_gray(found.depth_gray), depth_rel, atol=0.5 / 255 + 1e-9)


def test_a_turned_photo_whose_annotation_is_upright_is_stored_upright(add_depth):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = photo((60, 40), "JPEG", exif=exif)
    (found,) = add_depth([draft(image, ((4, 6, 20, 30),), "pixels", width=40, height=60)])
    assert found.reasons == ()
    assert (found.sample.width, found.sample.height) == (40, 60)
    assert found.sample.boxes == ((4 / 40, 6 / 60, 20 / 40, 30 / 60),)
    for kept in (found.sample.image, found.sample.depth_image, found.depth_gray):
        assert Image.open(io.BytesIO(kept)).size == (40, 60)


def test_cached_depth_is_taken_from_the_folder_and_a_broken_entry_is_made_again(tmp_path, monkeypatch):
    config = GenerateConfig(depth_cache=str(tmp_path))
    drafts = [draft(scene) for scene in SCENES]
    fresh = AddDepth(config)(drafts)
    entries = {path.stem: path for path in tmp_path.rglob("*.png")}
    assert set(entries) == {hashlib.sha256(scene).hexdigest() for scene in SCENES}
    broken = entries[hashlib.sha256(SCENES[1]).hexdigest()]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-20])
    prepared = []
    prepare = DepthEstimator.prepare
    monkeypatch.setattr(DepthEstimator, "prepare", lambda self, rgb: prepared.append(rgb) or prepare(self, rgb))
    assert AddDepth(config)(drafts) == fresh
    assert len(prepared) == 1
    assert broken.read_bytes() == whole


# --- boxes -----------------------------------------------------------------------------------------------------------

sides = st.integers(16, 3000)
fractions = st.tuples(*[st.floats(0, 1)] * 4).filter(lambda box: box[2] - box[0] > 0.01 and box[3] - box[1] > 0.01)


@given(fractions, sides, sides)
def test_every_frame_of_one_box_gives_that_box(box, width, height):
    x1, y1, x2, y2 = box
    given_boxes = {
        "image": box,
        "pixels": (x1 * width, y1 * height, x2 * width, y2 * height),
        "padded_square": image_to_padded_square(box, width, height),
    }
    for frame, given_box in given_boxes.items():
        assert to_image_frame(given_box, frame, width, height, "corrected") == pytest.approx(box, abs=1e-9)


@given(fractions, sides, sides)
def test_the_published_profile_takes_padded_numbers_for_fractions_of_the_image(box, width, height):
    assert to_image_frame(box, "padded_square", width, height, "published") == box


@given(fractions, st.integers(16, 900), st.integers(16, 900), st.integers(0, 3), st.floats(0.01, 5))
def test_a_side_may_leave_the_image_by_a_pixel_and_is_clipped(box, width, height, side, outside_px):
    size = (width, height)[side % 2]
    limit = 0.0 if side < 2 else 1.0
    outwards = -1 if side < 2 else 1
    for frame, unit in (("pixels", 1.0), ("image", 1 / size), ("padded_square", 1 / max(width, height))):
        scale = (width, height, width, height) if frame == "pixels" else (1, 1, 1, 1)
        moved = [number * factor for number, factor in zip(box, scale, strict=True)]
        moved[side] = limit * scale[side]
        if frame == "padded_square":
            moved = list(image_to_padded_square(tuple(moved), width, height))
        moved[side] += outwards * outside_px * unit
        if outside_px <= 0.999:
            expected = [*box[:side], limit, *box[side + 1 :]]
            assert to_image_frame(tuple(moved), frame, width, height, "corrected") == pytest.approx(expected, abs=1e-9)
        elif outside_px > 1.001:
            with pytest.raises(BoxError):
                to_image_frame(tuple(moved), frame, width, height, "corrected")
