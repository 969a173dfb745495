"""The dataset folder: finished when every shard is there, and read back as it was written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small_dataset import make_small_dataset

from sif_ray.config import GenerateConfig
from sif_ray.datagen import shards, stage
from sif_ray.datagen.content import content_of
from sif_ray.datagen.counts import Counts
from sif_ray.datagen.dataset import ACCEPTED, MANIFEST, DatasetError, read_manifest, read_rejected, read_samples
from sif_ray.datagen.index import read_shard, write_plan
from sif_ray.datagen.pipeline import open_draft
from sif_ray.datagen.source import make_source
from sif_ray.records import sample_from_row
from sif_ray.storage import Folder


def raw_rows(place: str, kind: str) -> list[dict]:
    """The rows of a dataset, file by file, with nothing of ours."""
    return [row for path in sorted(Path(place, kind).glob("*")) for row in pq.read_table(path).to_pylist()]


@pytest.fixture
def copy(small_dataset, tmp_path) -> Path:
    """A copy of the small dataset, to be damaged."""
    return Path(shutil.copytree(small_dataset.place, tmp_path / "copy"))


def test_rows_are_read_back_by_split_subset_and_reason(small_dataset):
    place = small_dataset.place
    expected = [sample_from_row(row) for row in raw_rows(place, "data")]
    expected.sort(key=lambda sample: (sample.split, sample.sample_id))
    assert read_samples(place) == read_samples(Folder.open(place)) == expected
    assert {sample.split for sample in expected} == {"train", "heldout"}
    for split in ("train", "heldout"):
        assert read_samples(place, split) == [sample for sample in expected if sample.split == split]
    drawn = json.loads(Path(place, "subsets.json").read_text())["sampled"]["sample_ids"]
    assert read_samples(place, "sampled") == [sample for sample in expected if sample.sample_id in drawn]
    assert len(drawn) == 12
    refused = {sample.sample_id: reasons for sample, reasons in read_rejected(place)}
    assert refused.keys() == small_dataset.reasons.keys()
    assert all(small_dataset.reasons[sample_id] in reasons for sample_id, reasons in refused.items())


def test_the_manifest_counts_what_is_there(small_dataset):
    accepted, refused = raw_rows(small_dataset.place, "data"), raw_rows(small_dataset.place, "rejected")
    counts = read_manifest(small_dataset.place)["counts"]
    assert (counts["accepted"], counts["rejected"]) == (len(accepted), len(refused))
    assert counts["accepted"] + counts["rejected"] == len(small_dataset.rows) + len(small_dataset.reasons)
    assert counts["scenes"] == len({row["scene_id"] for row in accepted + refused})
    for split, found in counts["splits"].items():
        rows = [row for row in accepted if row["split"] == split]
        assert found["accepted"] == len(rows) == sum(found["question_types"].values())
        assert found["scenes"] == len({row["scene_id"] for row in accepted + refused if row["split"] == split})
    assert set(small_dataset.reasons.values()) <= counts["reasons"].keys()


def test_counts_do_not_depend_on_the_order_of_the_shards(small_dataset):
    folder = Folder.open(small_dataset.place)
    summaries = [shards.summarise(folder, shard) for shard in range(len(folder.child(ACCEPTED).names()))]
    assert len(summaries) > 2
    totals = []
    for order in (summaries, summaries[::-1]):
        counts = Counts()
        for summary in order:
            counts.add(summary["rows"])
        totals.append(json.dumps(counts.total()))
    assert totals[0] == totals[1]


def test_what_is_not_there_is_named_and_what_is_there_is_told(small_dataset, tmp_path):
    with pytest.raises(DatasetError, match="make one with sif-ray generate"):
        read_samples(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="no split 'absent'; it has 'heldout', 'train', 'sampled'"):
        read_samples(small_dataset.place, "absent")


def test_a_dataset_of_another_format_is_refused(copy):
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(manifest | {"format": 1}))
    with pytest.raises(DatasetError, match="format 1; this version reads 2"):
        read_samples(copy)


def test_a_lost_shard_is_noticed_by_whoever_reads(copy):
    (copy / ACCEPTED / "00001.parquet").unlink()
    with pytest.raises(DatasetError, match="rows where the manifest says"):
        read_samples(copy)


def test_shards_that_the_driver_does_not_see_make_no_dataset(tmp_path):
    """As on a cluster whose nodes have a disk each."""
    small = make_small_dataset(str(tmp_path / "data"), tmp_path, num_shards=2)
    folder = Folder.open(small.place)
    plan = folder.read_json("plan.json")
    config, content = GenerateConfig(**plan["config"]), plan["content"]
    work = stage.Work(stage.index.read_plan(folder, content), stage.committed(folder))
    assert (work.done, len(work.todo)) == ([0, 1], plan["num_shards"] - 2)
    for shard in work.done:
        work.add(shards.summarise(folder, shard))
    with pytest.raises(RuntimeError, match=rf"lacks {len(work.todo)} shards .*shared storage"):
        stage.finish(folder, config, content, work, started_s=0.0)
    assert not folder.exists(MANIFEST)


def test_rows_that_are_all_refused_make_no_dataset(tmp_path):
    config = GenerateConfig(output=str(tmp_path / "data"), splits={"train": 2})
    folder, source = Folder.open(config.output), make_source(config)
    write_plan(folder, source.annotations(), config, content_of(config))
    annotations = [replace(annotation, error="id_duplicate") for annotation in read_shard(folder, 0)]
    drafts = [open_draft(source, annotation, config.profile) for annotation in annotations]
    shards.commit(folder, 0, drafts, [annotation.sample_id for annotation in annotations])
    with pytest.raises(RuntimeError, match=rf"all {len(drafts)} rows were refused: {{'id_duplicate': {len(drafts)}}}"):
        stage.run(config)
    assert not folder.exists(MANIFEST)
