"""Rows of LLaMA-Factory become samples: its own export comes back whole, other names and broken rows as they are."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from sif_ray.config import ConfigError
from sif_ray.datagen.dataset import read_manifest, read_rejected, read_samples
from sif_ray.datagen.llama_factory import add_arguments, run
from sif_ray.datagen.published import image_names
from sif_ray.method.prompts import SUFFIX, user_content
from sif_ray.toyworld.render import png, render
from sif_ray.toyworld.scenes import make_scene

TRACE = (
    '<think><area>[{"bbox_2d":[0.000,0.000,1.000,1.000],"depth":0.500}]</area>\n<text>Look closer.</text>'
    '<area>[{"bbox_2d":[0.100,0.200,0.300,0.400],"depth":0.250}]</area>\n<text>There it is.</text></think>'
    "\n<answer>red ball</answer>"
)


def data_import(*arguments: str | Path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args([str(argument) for argument in arguments]))


def user_text(question: str) -> str:
    return "".join(part.get("text", "<image>") for part in user_content(question))


@pytest.fixture
def pictures(tmp_path) -> tuple[str, str]:
    names = image_names("toy/7")
    rendering = render(make_scene(7))
    for name, pixels in zip(names, (rendering.rgb, rendering.rgb[::-1]), strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(pixels))
    return names


def write(folder: Path, rows: list[dict], registration: dict | None = None) -> Path:
    (folder / "rows.json").write_text(json.dumps(rows))
    if registration is not None:
        (folder / "dataset_info.json").write_text(json.dumps({"sif": {"file_name": "rows.json", **registration}}))
    return folder / "rows.json"


def turns(question: str, trace: str) -> list[dict]:
    return [{"role": "user", "content": user_text(question)}, {"role": "assistant", "content": trace}]


def test_a_row_of_the_released_layout_becomes_a_sample(tmp_path, pictures):
    file = write(tmp_path, [{"dataset": "gqa", "messages": turns("Which is nearer?", TRACE), "images": list(pictures)}])
    data_import(file, "--output", tmp_path / "data", "--split", "warmup")
    [sample] = read_samples(tmp_path / "data", "warmup")
    assert (sample.question, sample.answer, sample.trace) == ("Which is nearer?", "red ball", TRACE)
    assert sample.boxes == ((0.1, 0.2, 0.3, 0.4),)
    assert sample.frames == (((0.0, 0.0, 1.0, 1.0),), ((0.1, 0.2, 0.3, 0.4),))
    assert (sample.width, sample.height, sample.dataset) == (112, 112, "gqa")
    assert sample.image == (tmp_path / pictures[0]).read_bytes()
    assert sample.depth_image == (tmp_path / pictures[1]).read_bytes()
    assert read_manifest(tmp_path / "data")["counts"]["splits"]["warmup"]["accepted"] == 1


def test_the_names_that_dataset_info_gives_are_used(tmp_path, pictures):
    talk = [
        {"from": "system", "value": "You are a helpful assistant."},
        {"from": "human", "value": f"<image><image>Which is nearer?{SUFFIX}"},
        {"from": "gpt", "value": TRACE},
    ]
    file = write(
        tmp_path,
        [{"talk": talk, "pictures": list(pictures)}],
        {"formatting": "sharegpt", "columns": {"messages": "talk", "images": "pictures"}},
    )
    data_import(file, "--output", tmp_path / "data")
    [sample] = read_samples(tmp_path / "data", "train")
    assert sample.question == "Which is nearer?"


def test_rows_that_cannot_be_trained_on_are_refused_with_their_reason(tmp_path, pictures):
    good = {"messages": turns("Q?", TRACE), "images": list(pictures)}
    rows = [
        good,
        good | {"messages": turns("Q?", TRACE.replace("</think>", ""))},
        good | {"messages": turns("Q?", TRACE) * 2},
        good | {"images": list(pictures[:1])},
        good | {"images": [pictures[0], "depth/nowhere.png"]},
        good | {"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": TRACE}]},
        {},
    ]
    data_import(write(tmp_path, rows), "--output", tmp_path / "data")
    assert len(read_samples(tmp_path / "data")) == 1
    reasons = [list(reasons) for _, reasons in read_rejected(tmp_path / "data")]
    assert [row[0].split("_")[0] for row in reasons] == ["trace", "turns", "images", "image", "prompt", "turns"]
    assert reasons[3] == ["image_missing"]


@pytest.mark.parametrize(
    ("content", "registration", "message"),
    [
        (b'["\xc1\xb7"]', None, "cannot be read as a JSON list of rows"),
        (b"{", None, "cannot be read as a JSON list of rows"),
        (b"[]", None, "no row of 0 can be trained on"),
        (b"[]", {"formatting": "alpaca"}, "is of formatting 'alpaca', not sharegpt"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, content, registration, message):
    file = write(tmp_path, [], registration)
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        data_import(file, "--output", tmp_path / "data")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        data_import(file, "--output", tmp_path / "full")
