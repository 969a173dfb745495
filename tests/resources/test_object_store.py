"""The bound on what is in the object store at once, in numbers worked out by hand."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from sif_ray.config import ConfigError, GrpoConfig, LearnerConfig, PromptConfig, RayConfig, SamplingConfig
from sif_ray.records import Rollout, RolloutGroup, Sample
from sif_ray.resources.object_store import check_object_store, groups_bytes, weights_bytes


def _sample(image_bytes: int, depth_bytes: int) -> Sample:
    image, depth = b"x" * image_bytes, b"y" * depth_bytes
    return Sample("s", "s", "toy", "train", "?", "", "a", (), 112, 112, image, depth, "exact", "image")


def _config(**changes: Any) -> GrpoConfig:
    settings: dict[str, Any] = {
        "max_staleness": 2,
        "groups_per_step": 4,
        "group_size": 8,
        "sampling": SamplingConfig(max_tokens=100),
        "ray": RayConfig(object_store_mib=100),
    }
    return GrpoConfig(**(settings | changes))


def test_the_bound_of_groups_is_that_of_the_window() -> None:
    samples = [_sample(10_000, 3_000), _sample(20_000, 1_000)]
    assert groups_bytes(_config(), samples) == 2 * 12 * (21_000 + 8 * 100 * 16)
    assert groups_bytes(_config(max_staleness=0), samples) == 2 * 4 * (21_000 + 8 * 100 * 16)
    rgb_only = _config(prompt=PromptConfig(depth_image=False))
    assert groups_bytes(rgb_only, samples) == 2 * 12 * (20_000 + 8 * 100 * 16)


def test_a_real_group_is_within_the_bound() -> None:
    sample = _sample(20_000, 1_000)
    rollouts = tuple(
        Rollout(np.arange(100, dtype=np.int32), np.full(100, -1.0, np.float32), ((0, 100),), "length", f"{i}" * 400)
        for i in range(8)
    )
    images = (sample.image, sample.depth_image)
    group = RolloutGroup("t", "s", np.arange(150, dtype=np.int32), images, ((1, 8, 8), (1, 8, 8)), rollouts)
    travelling = len(pickle.dumps(group))
    one = groups_bytes(_config(max_staleness=0, groups_per_step=1), [sample]) // 2
    assert 0.5 * one < travelling < one


def test_weights_count_where_they_pass_the_object_store() -> None:
    assert weights_bytes(_config(), 1_000_000) == 2 * 4_000_000
    half = _config(learner=LearnerConfig(dtype="bfloat16", num_gpus_per_rank=1))
    assert weights_bytes(half, 1_000_000) == 2 * 2_000_000
    assert weights_bytes(_config(weight_transfer="gloo"), 1_000_000) == 0


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, False),
        ({"ray": RayConfig(object_store_mib=120)}, True),
        ({"weight_transfer": "gloo"}, True),
        ({"ray": RayConfig(address="auto", object_store_mib=100)}, True),
        ({"weight_transfer": "gloo", "groups_per_step": 2000}, False),
    ],
)
def test_a_store_that_is_too_small_is_refused_with_the_size_that_is_not(changes: dict[str, Any], fits: bool) -> None:
    config = _config(**changes)
    samples = [_sample(20_000, 1_000)]
    if fits:
        check_object_store(config, 13_500_000, samples)
        return
    with pytest.raises(ConfigError, match=r"ray\.object_store_mib = 100: .* raise it to (\d+)") as refused:
        check_object_store(config, 13_500_000, samples)
    enough = int(str(refused.value).split("raise it to ")[1].split(",")[0])
    check_object_store(_config(**(changes | {"ray": RayConfig(object_store_mib=enough)})), 13_500_000, samples)
