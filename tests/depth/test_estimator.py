"""The tiny depth model through the path that every Depth Anything takes, against a baseline that looks at no pixel."""

from __future__ import annotations

import io
import logging

import numpy as np
import pytest
from PIL import Image

from sif_ray.depth.encoding import depth_png
from sif_ray.depth.estimator import DepthEstimator
from sif_ray.method.depth_code import box_mean, decode, from_disparity
from sif_ray.toyworld.render import render
from sif_ray.toyworld.scenes import make_scene

SEEDS = range(60)


@pytest.fixture(scope="module")
def estimator() -> DepthEstimator:
    return DepthEstimator("toy")


def test_it_reads_depth_where_height_and_size_say_nothing(estimator):
    scenes = [make_scene(seed) for seed in SEEDS]
    renderings = [render(scene) for scene in scenes]
    estimates = estimator.estimate([Image.fromarray(rendering.rgb) for rendering in renderings])
    right, lower, errors = [], [], []
    for scene, rendering, depth_rel in zip(scenes, renderings, estimates, strict=True):
        errors.append(np.abs(depth_rel - from_disparity(rendering.disparity)).mean())
        means = [box_mean(depth_rel, rendering.box(index)) for index in range(len(scene.solids))]
        for i, a in enumerate(scene.solids):
            for j, b in enumerate(scene.solids):
                if b.z_m / a.z_m >= 1.2:
                    right.append(means[i] < means[j])
                    lower.append(rendering.box(i)[3] > rendering.box(j)[3])
    assert np.mean(right) > 0.85 > 0.65 > np.mean(lower)
    assert np.mean(errors) < 0.08


def test_photos_of_any_size_come_back_in_order_and_in_their_own_size(estimator):
    looks = [((60, 40), "red"), ((33, 71), "blue"), ((60, 40), "green")]
    photos = [Image.new("RGB", size, colour) for size, colour in looks]
    found = estimator.estimate(photos)
    assert [depth.shape for depth in found] == [(40, 60), (71, 33), (40, 60)]
    for photo, depth in zip(photos, found, strict=True):
        np.testing.assert_allclose(depth, estimator.estimate([photo])[0], atol=1e-5)
        assert 0 <= depth.min() <= depth.max() <= 1


def test_the_png_holds_the_map_in_256_steps():
    depth_rel = np.linspace(0, 1, 48).reshape(6, 8)
    back = decode(np.asarray(Image.open(io.BytesIO(depth_png(depth_rel)))))
    np.testing.assert_allclose(back, depth_rel, atol=0.5 / 255 + 1e-9)


def test_no_photos_are_no_maps(estimator):
    assert estimator.estimate([]) == []


def test_the_model_is_named_after_its_folder_and_a_non_commercial_licence_is_told(estimator, tmp_path, caplog):
    from sif_ray.toyworld.assets import path

    assert estimator.name == "tiny_depth"
    large = tmp_path / "Depth-Anything-V2-Large-hf"
    large.symlink_to(path("tiny_depth"))
    with caplog.at_level(logging.WARNING):
        assert DepthEstimator(str(large)).name == large.name
    assert "CC-BY-NC-4.0" in caplog.text
