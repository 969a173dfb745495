"""The released layout is what LLaMA-Factory reads, with the images that it names, wherever the dataset lies."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from object_store import object_store
from PIL import Image
from small_dataset import SmallDataset, make_small_dataset

from sif_ray import cli
from sif_ray.config import GenerateConfig
from sif_ray.datagen.dataset import read_samples
from sif_ray.datagen.published import image_names
from sif_ray.datagen.selection import HELDOUT
from sif_ray.datagen.subsets import draw_subsets
from sif_ray.method.prompts import SUFFIX_WITH_DEPTH_WORDS
from sif_ray.records import Sample
from sif_ray.storage import Folder

KEYS = ["dataset", "image", "depth_image", "problem", "normalized_solution_round", "response", "messages", "images"]


def read_as_llama_factory(dataset_dir: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a dataset by the rules of LLaMA-Factory's sharegpt converter and its Qwen2-VL plugin.

    Turns alternate between user and assistant and end with the assistant; images lie below the folder of
    dataset_info.json; a placeholder stands for every image, and for no video or audio.
    """
    info = json.loads((dataset_dir / "dataset_info.json").read_text(encoding="utf-8"))[name]
    assert info["formatting"] == "sharegpt"
    columns, tags = info["columns"], info["tags"]
    rows = json.loads((dataset_dir / info["file_name"]).read_text(encoding="utf-8"))
    for row in rows:
        turns = row[columns["messages"]]
        assert len(turns) % 2 == 0
        roles = [turn[tags["role_tag"]] for turn in turns]
        assert roles == [tags["user_tag"], tags["assistant_tag"]] * (len(turns) // 2)
        text = "".join(turn[tags["content_tag"]] for turn in turns)
        assert text.count("<image>") == len(row[columns["images"]])
        assert "<video>" not in text and "<audio>" not in text
        assert all((dataset_dir / image).is_file() for image in row[columns["images"]])
    return rows


@pytest.fixture(scope="module")
def samples(small_dataset: SmallDataset) -> dict[str, Sample]:
    return {sample.sample_id: sample for sample in read_samples(small_dataset.place)}


@pytest.fixture(scope="module")
def exported(small_dataset: SmallDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("export") / "sif"
    assert cli.main(["data", "export", small_dataset.place, "--output", str(output)]) == 0
    return output


def test_llama_factory_reads_every_accepted_row(exported: Path, samples: dict[str, Sample]) -> None:
    rows = read_as_llama_factory(exported, "sif")
    by_content = {(sample.trace, sample.question): sample for sample in samples.values()}
    assert len(rows) == len(samples)
    for row in rows:
        assert list(row) == KEYS
        user, assistant = (turn["content"] for turn in row["messages"])
        sample = by_content.pop((assistant, row["problem"]))
        question = sample.question.replace("<image>", "< image>")
        assert user == f"Original image: <image>\nDepth image: <image>\n{question}{SUFFIX_WITH_DEPTH_WORDS}"
        assert (row["dataset"], row["response"]) == (sample.dataset, sample.answer)
        truth = row["normalized_solution_round"]
        assert np.array(truth["bbox_3d"]) == pytest.approx(
            np.array(sample.boxes), abs=0.0056
        )  # three decimals, then two
        assert truth["illegal_content"] is False
        assert row["images"] == [row["image"], row["depth_image"]]
        assert [(exported / name).read_bytes() for name in row["images"]] == [sample.image, sample.depth_image]
    assert not by_content


def test_only_named_images_are_exported(exported: Path) -> None:
    rows = json.loads((exported / "published.json").read_text(encoding="utf-8"))
    files = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    images = {image for row in rows for image in row["images"]}
    assert files == images | {"published.json", "published-sampled.json", "dataset_info.json"}


def test_the_sampled_subset_is_the_one_that_is_registered(
    small_dataset: SmallDataset, exported: Path, samples: dict[str, Sample]
) -> None:
    (subset,) = json.loads((Path(small_dataset.place) / "subsets.json").read_text(encoding="utf-8")).values()
    assert subset["seed"] == 0 and len(set(subset["sample_ids"])) == 12
    rows = read_as_llama_factory(exported, "sif_sampled")
    drawn = [samples[sample_id] for sample_id in subset["sample_ids"]]
    assert sorted(row["messages"][1]["content"] for row in rows) == sorted(sample.trace for sample in drawn)
    assert [sample.sample_id for sample in read_samples(small_dataset.place, "sampled")] == sorted(
        subset["sample_ids"], key=lambda sample_id: (samples[sample_id].split, sample_id)
    )
    assert HELDOUT in {sample.split for sample in samples.values()}
    assert HELDOUT not in {sample.split for sample in drawn}


def batch(rows: list[tuple[str, str, str, int]]) -> pa.RecordBatch:
    box = [0.0, 0.0, 0.5, 0.5]
    names = ("sample_id", "dataset", "split")
    columns = {name: [row[place] for row in rows] for place, name in enumerate(names)}
    boxes = pa.array([[box] * row[3] for row in rows], pa.list_(pa.list_(pa.float64())))
    return pa.RecordBatch.from_pydict({**columns, "boxes": boxes})


def test_the_subset_is_even_over_datasets_and_rows_with_several_boxes() -> None:
    rows = [(f"many-{k}", "many", "train", 1) for k in range(500)]
    rows += [(f"few-{k}", "few", "train", 1) for k in range(5)]
    rows += [(f"boxes-{k}", "many", "train", 3) for k in range(100)]
    rows += [(f"held-{k}", "many", HELDOUT, 3) for k in range(100)]
    subsets = draw_subsets([batch(rows[:300]), batch(rows[300:])], GenerateConfig(subset_rows=45, seed=3))
    counts = Counter(sample_id.split("-")[0] for sample_id in subsets["sampled"]["sample_ids"])
    assert counts == {"many": 20, "few": 5, "boxes": 20}
    assert draw_subsets([batch(rows)], GenerateConfig(subset_rows=0)) == {}


def test_hugging_face_datasets_reads_the_shards(
    small_dataset: SmallDataset, samples: dict[str, Sample], tmp_path: Path
) -> None:
    import datasets

    found = datasets.load_dataset(
        "parquet", data_files=f"{small_dataset.place}/data/*.parquet", split="train", cache_dir=str(tmp_path)
    )
    assert sorted(found["sample_id"]) == sorted(samples)
    for row in found:
        sample = samples[row["sample_id"]]
        for encoded in (row["image"], row["depth_image"]):
            with Image.open(io.BytesIO(encoded)) as picture:
                assert picture.convert("RGB").size == (sample.width, sample.height)
        assert row["boxes"] == [list(box) for box in sample.boxes]


@pytest.mark.timeout(120)
def test_a_dataset_in_an_object_store_is_inspected_and_exported(tmp_path: Path) -> None:
    with object_store() as store:
        made = make_small_dataset(store.url("sif"), tmp_path)
        assert cli.main(["data", "export", made.place, "--output", str(tmp_path / "sif")]) == 0
        rows = read_as_llama_factory(tmp_path / "sif", "sif")
        assert cli.main(["data", "export", made.place]) == 0
        folder = Folder.open(made.place)
        assert cli.main(["data", "inspect", made.place, "--open", "no"]) == 0
        assert f"{len(rows)} questions about".encode() in folder.read("inspection.html")
        assert all(
            folder.read(name) == (tmp_path / "sif" / name).read_bytes() for row in rows for name in row["images"]
        )


@pytest.mark.parametrize("missing", ["nowhere", "unfinished"])
def test_what_is_not_finished_is_not_exported(
    small_dataset: SmallDataset, missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if missing == "unfinished":
        (tmp_path / missing).mkdir()
        (tmp_path / missing / "plan.json").write_bytes((Path(small_dataset.place) / "plan.json").read_bytes())
    assert cli.main(["data", "export", str(tmp_path / missing), "--output", str(tmp_path / "out")]) == 2
    assert "no finished dataset" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dataset_that_is_its_own_output_keeps_its_files(small_dataset: SmallDataset, tmp_path: Path) -> None:
    place = shutil.copytree(small_dataset.place, tmp_path / "sif")
    before = (place / "published.json").read_bytes()
    assert cli.main(["data", "export", str(place), "--output", f"{place}/../sif"]) == 0
    assert (place / "published.json").read_bytes() == before
    read_as_llama_factory(place, "sif")


def test_the_register_of_other_datasets_is_not_overwritten(
    small_dataset: SmallDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dataset_info.json").write_text('{"identity": {"file_name": "identity.json"}}')
    assert cli.main(["data", "export", small_dataset.place, "--output", str(tmp_path)]) == 2
    assert "registers other datasets" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["dataset_info.json"]


@given(scene_ids=st.sets(st.text(alphabet="ab./ %\\:<é\n", max_size=8), min_size=2))
def test_scenes_have_names_of_their_own_below_the_folder(scene_ids: set[str]) -> None:
    names = [name for scene_id in scene_ids for name in image_names(scene_id)]
    assert len(set(names)) == 2 * len(scene_ids)
    for name in names:
        parts = PurePosixPath(name).parts
        assert parts[0] in ("images", "depth") and len(parts) > 1 and ".." not in parts
        assert "/".join(parts) == name
