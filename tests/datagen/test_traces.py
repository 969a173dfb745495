"""Frames and traces of the template teacher."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sif_ray.config import GenerateConfig
from sif_ray.datagen.drafts import Draft
from sif_ray.datagen.photos import Photo
from sif_ray.datagen.rows import photo_rows
from sif_ray.datagen.sources import make_source
from sif_ray.datagen.traces import TemplateTraces
from sif_ray.depth.encoding import depth_png
from sif_ray.method import depth_code
from sif_ray.records import Sample


def gray_png(depth_image: bytes) -> bytes:
    with Image.open(io.BytesIO(depth_image)) as image:
        depth_rel = depth_code.decode(np.asarray(image))
    buffer = io.BytesIO()
    Image.fromarray(np.rint(depth_rel * 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("profile", ["corrected", "published"])
@pytest.mark.parametrize("decimals", [2, 3])
def test_equal_to_photo_rows(profile, decimals):
    config = GenerateConfig(splits={"train": 30}, decimals=decimals, profile=profile)
    source = make_source(config)
    rows, drafts = [], []
    rng = np.random.default_rng(0)
    for key in source.list_keys():
        photo = source.load(key)
        photo = replace(
            photo,
            width=112,
            height=112,
            depth_image=photo.depth_image or depth_png(rng.random((112, 112))),
            depth_source="exact",
        )
        found = photo_rows(photo, config)
        rows += found
        for row, item in zip(found, photo.annotations, strict=True):
            drafts.append(Draft(replace(row.sample, frames=(), trace=""), item.names, (), gray_png(photo.depth_image)))
    made = TemplateTraces(config)(drafts)
    assert [d.sample for d in made] == [r.sample for r in rows]
    assert all(not d.reasons for d in made)
