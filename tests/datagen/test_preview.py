"""A dry run of `generate` says what the run would find, make and ask, and refuses what the run would refuse."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from small_dataset import ATTACK, SmallDataset

from sif_ray import cli
from sif_ray.config import ConfigError, GenerateConfig, TeacherConfig
from sif_ray.datagen.preview import MAX_COUNTED_BYTES, MAX_COUNTED_SCENES, preview

CLOSED_PORT = "http://127.0.0.1:9/v1"


def test_rows_are_counted_by_dataset(small_dataset: SmallDataset, tmp_path: Path) -> None:
    lines = preview(replace(small_dataset.config, output=str(tmp_path / "new"))).splitlines()
    counts = Counter(row["dataset"] for row in small_dataset.rows)
    counts["toyworld"] += len(small_dataset.reasons)  # the broken rows were made of one
    assert f"  rows: {counts.total()} in 4 shards of 16" in lines
    assert [line.split() for line in lines if line.startswith("    ") and line.split()[0] in counts] == [
        [dataset, str(count)] for dataset, count in counts.most_common()
    ]
    assert "    to be refused, question_empty: 1" in lines
    (input_file,) = small_dataset.config.input
    assert any(line.strip().startswith(f"{input_file}  ") for line in lines)
    assert f"  output: {tmp_path / 'new'}; a run would start" in lines
    assert not (tmp_path / "new").exists()


def test_it_says_how_a_run_would_go_on(small_dataset: SmallDataset, tmp_path: Path) -> None:
    assert "finished; a run would do nothing" in preview(small_dataset.config)
    begun = tmp_path / "begun"
    shutil.copytree(small_dataset.place, begun)
    (begun / "manifest.json").unlink()
    (begun / "data" / "00001.parquet").unlink()
    assert "a run would go on, 3 of 4 shards are done" in preview(replace(small_dataset.config, output=str(begun)))


def test_what_a_run_would_refuse_is_refused(small_dataset: SmallDataset) -> None:
    with pytest.raises(ConfigError, match=r"another configuration: decimals"):
        preview(replace(small_dataset.config, decimals=3))


@pytest.mark.parametrize("place", ["nowhere.jsonl", "nowhere/*.jsonl"])
def test_files_may_be_elsewhere(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "source=jsonl", f"input=[{place}]", "images=no_pictures", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"not found here: input = '{place}'" in shown
    assert "no_pictures': there is no such folder" in shown


def test_large_sources_are_not_read(tmp_path: Path) -> None:
    large = tmp_path / "large.jsonl"
    with large.open("wb") as file:
        file.truncate(MAX_COUNTED_BYTES + 1)  # zeros, which are no annotations
    config = GenerateConfig(output=str(tmp_path / "new"), source="jsonl", input=[str(large)])
    assert "counting them needs a pass over 32 MB" in preview(config)
    scenes = GenerateConfig(output=str(tmp_path / "new"), splits={"train": MAX_COUNTED_SCENES + 1})
    assert "at most 2 for each of 10,001 scenes" in preview(scenes)


def test_the_teacher_is_shown_and_not_asked(small_dataset: SmallDataset, tmp_path: Path) -> None:
    config = replace(small_dataset.config, output=str(tmp_path / "new"), decimals=3)
    assert "no model is asked" in preview(config)
    teacher = TeacherConfig(kind="llm", model="some-model", base_url=CLOSED_PORT)
    shown = preview(replace(config, teacher=teacher))
    first = small_dataset.rows[0]
    assert f"some-model ({CLOSED_PORT})" in shown and ATTACK not in shown
    assert f"The prompt is {first['question']}, and the final gt answer is {first['answer']}." in shown
