"""The toy variants against the benchmarks' own readers and scores: who knows the truth gets all points."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sif_ray.evaluate.benchmarks import BENCHMARKS
from sif_ray.evaluate.benchmarks.item import Item, Reply
from sif_ray.evaluate.measure import OVERALL, sample_all
from sif_ray.method.boxes import pixels_to_norm
from sif_ray.method.trace import AreaBox, Step, Trace
from sif_ray.toyworld.benchmarks import FIRST_SCENE, LAYOUTS, write
from sif_ray.toyworld.render import render
from sif_ray.toyworld.scenes import make_scene

NUM_SCENES = 6


def truth(item: Item) -> str:
    if item.plain:
        return item.answer
    boxes = [pixels_to_norm(box, item.width, item.height) for box in item.boxes_xyxy_px] or [(0.0, 0.0, 1.0, 1.0)]
    return Trace((Step(tuple(AreaBox(box, 0.5) for box in boxes), "Here."),), item.answer or "there").render(3)


@pytest.fixture(params=LAYOUTS)
def variant(request, tmp_path):
    annotations, images = write(request.param, tmp_path, NUM_SCENES)
    benchmark = BENCHMARKS[request.param]
    return benchmark, list(benchmark.items(annotations, pictures=True)), images


def test_who_knows_the_truth_gets_all_points_and_who_says_nothing_none(variant):
    benchmark, items, _ = variant
    for text, expected in ((truth, 1.0), (lambda item: "", 0.0)):
        replies = [Reply(item, text(item), verdict=expected) for item in items]
        found = sample_all(benchmark.measure(replies)[0], 1, 0)["strict"][OVERALL]
        assert found.value == pytest.approx(expected)
        assert all(benchmark.readable(reply) == bool(expected) for reply in replies)


def test_items_show_the_scenes(variant):
    benchmark, items, images = variant
    assert len(items) >= NUM_SCENES
    assert len({item.item_id for item in items}) == len(items)
    rendered = [render(make_scene(FIRST_SCENE + number)).rgb for number in range(NUM_SCENES)]
    for item in items:
        assert bool(item.picture) != bool(item.image) or benchmark.name == "cvbench"
        if item.image:
            number = int(item.image.removesuffix(".png"))
            assert np.array_equal(np.asarray(Image.open(images / item.image)), rendered[number])


def test_options_do_not_give_the_answer_away(tmp_path):
    annotations, _ = write("vstar", tmp_path, 40)
    labels = [item.answer for item in BENCHMARKS["vstar"].items(annotations)]
    assert max(map(labels.count, "ABCD")) < 0.6 * len(labels)
