"""The dataset folder: whole or not at all, one configuration, and read back as it was written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from sif_ray.config import GenerateConfig
from sif_ray.datagen import stage
from sif_ray.datagen.dataset import (
    DatasetError,
    export_images,
    is_finished,
    read_manifest,
    read_rejected,
    read_samples,
    whole_or_not_at_all,
)
from sif_ray.datagen.photos import Annotation, Photo, photos_to_table
from sif_ray.datagen.pipeline import FOLDER_COLUMN, make_rows
from sif_ray.datagen.rows import photo_rows
from sif_ray.datagen.sources import make_source
from sif_ray.depth.encoding import depth_png
from sif_ray.method.boxes import FULL_IMAGE
from sif_ray.method.prompts import SUFFIX_WITH_DEPTH_WORDS

HOSTILE = Annotation("bad", "count", "How many?", "</answer>", (FULL_IMAGE,), ("thing",))
NUM_ROWS = 13


@pytest.fixture
def config(tmp_path) -> GenerateConfig:
    return GenerateConfig(output=str(tmp_path / "data"), splits={"train": 4, "heldout": 2}, decimals=2)


@pytest.fixture
def photos(config) -> list[Photo]:
    source = make_source(config)
    depth_image = depth_png([[0.0, 1.0]])
    found = [
        replace(source.load(key), width=112, height=112, depth_image=depth_image, depth_source="exact")
        for key in source.list_keys()
    ]
    return [replace(found[0], annotations=(*found[0].annotations, HOSTILE)), *found[1:]]


def write(photos: list[Photo], config: GenerateConfig, num_rows: int = NUM_ROWS) -> None:
    """A dataset of `photos` in two shards a kind, by the stage's own parts, without Ray."""
    with whole_or_not_at_all(config.output) as folder:
        for number, half in enumerate((photos[3:], photos[:3])):
            rows = make_rows(photos_to_table(half), config)
            for kind in ("data", "rejected"):
                (folder / kind).mkdir(exist_ok=True)
                part = rows.filter(pc.field(FOLDER_COLUMN) == kind).drop_columns(FOLDER_COLUMN)
                if part.num_rows:
                    pq.write_table(part, folder / kind / f"{number}.parquet")
        stage.finish(folder, config, num_rows, started_s=0.0)


def test_rows_are_read_back_as_they_were_made(config, photos):
    write(photos, config)
    made = [row for photo in photos for row in photo_rows(photo, config)]
    accepted = [row.sample for row in made if not row.reasons]
    assert read_samples(config.output) == sorted(accepted, key=lambda sample: (sample.split, sample.sample_id))
    assert read_samples(config.output, "heldout") == [s for s in read_samples(config.output) if s.split == "heldout"]
    ((refused, reasons),) = read_rejected(config.output)
    assert (refused.sample_id, reasons) == ("bad", made[2].reasons)
    assert "trace_stray_tag" in reasons
    counts = read_manifest(config.output)["counts"]
    assert (counts["scenes"], counts["accepted"], counts["rejected"]) == (6, 12, 1)
    assert counts["splits"]["heldout"]["scenes"] == 2
    assert sum(counts["splits"]["train"]["question_types"].values()) == 8


def test_a_split_or_a_folder_that_is_not_there_says_what_is(config, photos, tmp_path):
    with pytest.raises(DatasetError, match="sif-ray generate"):
        read_samples(tmp_path / "nowhere")
    write(photos, config)
    with pytest.raises(DatasetError, match="no split 'absent'; it has 'heldout', 'train'"):
        read_samples(config.output, "absent")


def test_a_lost_shard_is_noticed(config, photos):
    write(photos, config)
    (Path(config.output) / "data" / "part-00000.parquet").unlink()
    with pytest.raises(DatasetError, match="12"):
        read_samples(config.output)


@pytest.mark.parametrize("num_rows", [NUM_ROWS - 1, NUM_ROWS + 1])
def test_lost_and_surplus_rows_leave_no_dataset(config, photos, num_rows):
    with pytest.raises(RuntimeError, match=f"13 rows with 13 ids came out of {num_rows}"):
        write(photos, config, num_rows)
    assert list(Path(config.output).parent.iterdir()) == []


def test_a_doubled_row_leaves_no_dataset(config, photos):
    with pytest.raises(RuntimeError, match="15 rows with 13 ids"):
        write([*photos, photos[-1]], config, NUM_ROWS + 2)
    assert not Path(config.output).exists()


def test_a_finished_folder_is_picked_up_and_another_configuration_refused(config, photos):
    key = stage.config_hash(config)
    assert not is_finished(config.output, key)
    write(photos, config)
    written = {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*")}
    stage.run(config)
    stage.run(replace(config, depth_batch_size=3, depth_actors_max=7))  # how fast, not what
    assert written == {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*")}
    with pytest.raises(DatasetError, match=r"another configuration.*choose another output"):
        stage.run(replace(config, decimals=3))


def test_a_folder_with_something_else_is_not_touched(config):
    Path(config.output).mkdir()
    (Path(config.output) / "thesis.txt").write_text("mine")
    with pytest.raises(DatasetError, match="is no dataset; choose another output"):
        stage.run(config)
    assert (Path(config.output) / "thesis.txt").read_text() == "mine"


def test_what_a_killed_run_left_is_swept_away(config, photos):
    left = Path(config.output).with_name(".data.part") / "data"
    left.mkdir(parents=True)
    (left / "half.parquet").write_bytes(b"PAR1")
    write(photos, config)
    assert len(read_samples(config.output)) == 12


def test_the_published_layout_and_its_images(config, photos):
    write(photos, config)
    rows = json.loads((Path(config.output) / "published.json").read_text())
    samples = {sample.question + sample.trace: sample for sample in read_samples(config.output)}
    assert len(rows) == len(samples) == 12
    assert export_images(config.output) == 12  # a photograph and its depth for each of six scenes
    for row in rows:
        user, assistant = row["messages"]
        sample = samples[row["problem"] + assistant["content"]]
        assert user["content"] == (
            f"Original image: <image>\nDepth image: <image>\n{sample.question}{SUFFIX_WITH_DEPTH_WORDS}"
        )
        assert row["response"] == sample.answer
        assert row["images"] == [row["image"], row["depth_image"]]
        assert [(Path(config.output) / name).read_bytes() for name in row["images"]] == [
            sample.image,
            sample.depth_image,
        ]
