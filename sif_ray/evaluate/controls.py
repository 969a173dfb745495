"""Controls that take sight away: what a policy scores without the right image is not sight.

"blind" shows both images of another scene, "swapped_depth" the right photograph with another scene's depth image.
Answers are always judged against the item's own scene.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from sif_ray.records import Sample

Control = Literal["none", "blind", "swapped_depth"]


def donors(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """For each sample one of another scene, the same for all samples of a scene; deterministic by seed.

    No scene receives itself and every scene gives to exactly one (a random cyclic order). Raises `ValueError` for fewer
    than two scenes.
    """
    first_of_scene: dict[str, Sample] = {}
    for sample in samples:
        first_of_scene.setdefault(sample.scene_id, sample)
    scenes = sorted(first_of_scene)
    if len(scenes) < 2:
        raise ValueError(f"{len(scenes)} scene(s) in the split; the blind control needs the images of a second one")
    order = [scenes[index] for index in np.random.default_rng(seed).permutation(len(scenes))]
    giver = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [first_of_scene[giver[sample.scene_id]] for sample in samples]


def shown_images(sample: Sample, donor: Sample, control: Control, depth_image: bool) -> tuple[bytes, ...]:
    """The encoded images shown for `sample`: (rgb,) or, when the prompt has a depth image, (rgb, depth)."""
    rgb = donor.image if control == "blind" else sample.image
    if not depth_image:
        return (rgb,)
    return (rgb, sample.depth_image if control == "none" else donor.depth_image)
