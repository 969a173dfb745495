"""The tiny depth model through the path that every Depth Anything takes, against a baseline that looks at no pixel."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from sif_ray.depth.checkpoint import tell_licence
from sif_ray.depth.estimator import DepthEstimator
from sif_ray.method.depth_code import box_mean, from_disparity
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


def test_no_photos_are_no_maps(estimator):
    assert estimator.estimate([]) == []


def test_a_non_commercial_licence_is_told(caplog):
    for model in ("toy", "depth-anything/Depth-Anything-V2-Small-hf", "Large-models/Depth-Anything-V2-Small-hf"):
        tell_licence(model)
    assert not caplog.messages
    for size in ("Base", "Large", "Giant"):
        tell_licence(f"depth-anything/Depth-Anything-V2-{size}-hf")
    assert [message.count("CC-BY-NC-4.0") for message in caplog.messages] == [1, 1, 1]


def test_the_identity_is_that_of_the_weights_and_of_the_preparation(estimator, tmp_path):
    from sif_ray.toyworld.assets import path

    assert DepthEstimator("toy").identity == estimator.identity
    assert estimator.identity.startswith("tiny_depth-")
    other = tmp_path / "tiny_depth"
    shutil.copytree(path("tiny_depth"), other)
    assert DepthEstimator(str(other)).identity == estimator.identity
    settings = other / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace('"ensure_multiple_of": 7', '"ensure_multiple_of": 14'))
    assert DepthEstimator(str(other)).identity != estimator.identity


def test_photos_of_one_shape_are_one_batch_on_a_gpu_and_come_back_as_from_one_pass(estimator, monkeypatch):
    """The batches are a GPU's; what runs them here is the CPU."""
    batched = DepthEstimator("toy", batch_size=2)
    monkeypatch.setattr(batched, "_batch_size", 2)
    sizes = []
    estimate_batch = batched._estimate_batch
    monkeypatch.setattr(batched, "_estimate_batch", lambda inputs: sizes.append(len(inputs)) or estimate_batch(inputs))
    photos = [Image.fromarray(render(make_scene(seed)).rgb) for seed in range(5)]
    found = batched.estimate(photos)
    assert sizes == [2, 2, 1]
    for depth_rel, expected in zip(found, estimator.estimate(photos), strict=True):
        np.testing.assert_allclose(depth_rel, expected, atol=1e-5)
