from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sif_ray.evaluate.controls import donors, shown_images
from sif_ray.records import Sample


def sample(scene: str, number: int = 0) -> Sample:
    return Sample(
        sample_id=f"{scene}-{number}", scene_id=scene, dataset="test", split="heldout", question="?", question_type="",
        answer="", boxes=(), width=1, height=1, image=f"rgb {scene}".encode(), depth_image=f"depth {scene}".encode(),
        depth_source="exact", source_frame="image",
    )  # fmt: skip


@given(st.integers(2, 60), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_every_scene_sees_another_and_gives_once(num_scenes, per_scene, seed):
    samples = [sample(f"s{scene}", number) for scene in range(num_scenes) for number in range(per_scene)]
    given_N = donors(samples, seed)
    pairs = {(own.scene_id, donor.scene_id) for own, donor in zip(samples, given_N, strict=True)}
    assert all(own != donor for own, donor in pairs)
    assert len(pairs) == num_scenes == len({donor for _, donor in pairs})
    assert given_N == donors(samples, seed)


def test_another_seed_gives_another_order():
    samples = [sample(f"s{scene}") for scene in range(50)]
    assert donors(samples, 0) != donors(samples, 1)


def test_one_scene_cannot_be_blinded():
    with pytest.raises(ValueError, match="second one"):
        donors([sample("a", 0), sample("a", 1)], 0)


def test_images_of_each_control():
    own, other = sample("own"), sample("other")
    assert shown_images(own, other, "none", True) == (b"rgb own", b"depth own")
    assert shown_images(own, other, "blind", True) == (b"rgb other", b"depth other")
    assert shown_images(own, other, "swapped_depth", True) == (b"rgb own", b"depth other")
    assert shown_images(own, other, "blind", False) == (b"rgb other",)
    assert shown_images(own, other, "none", False) == (b"rgb own",)
