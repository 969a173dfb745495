"""Annotation files as sources: every real row, the same box in every frame, and what is broken."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from object_store import object_store
from PIL import Image
from samples import NAMES, REC_FILES, SAMPLES, conversations, detections, lines, needs_samples

from sif_ray.config import ConfigError, GenerateConfig
from sif_ray.datagen.annotations import ANNOTATION_SCHEMA, Annotation, annotation_to_row
from sif_ray.datagen.depth_stage import to_image_frame
from sif_ray.datagen.pictures import PhotoError, decode
from sif_ray.datagen.source import make_source
from sif_ray.datagen.source.depth import colour_depth
from sif_ray.datagen.source.picture_folder import PictureFolder
from sif_ray.method import depth_code
from sif_ray.method.boxes import image_to_padded_square
from sif_ray.storage import Folder

REQUEST = " Please provide the bounding box coordinate of the region that can help you answer the question better."


def read(source: str, *places: Path | str, profile: str = "corrected", images: str = "") -> list[Annotation]:
    config = GenerateConfig(source=source, input=[str(place) for place in places], profile=profile, images=images)
    return list(make_source(config).annotations())


def jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """A file with one row per line; bytes are written as they are."""
    parts = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    path.write_bytes(b"".join(part + b"\n" for part in parts))
    return path


def array(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


def pixels(annotation: Annotation, width: int, height: int, profile: str = "corrected") -> list[list[float]]:
    boxes = [to_image_frame(box, annotation.frame, width, height, profile) for box in annotation.boxes]
    return [[x1 * width, y1 * height, x2 * width, y2 * height] for x1, y1, x2, y2 in boxes]


def conversation(**changes: Any) -> dict[str, Any]:
    turns = [f"<image>\nWhat is it?{REQUEST}", "[0.1, 0.2, 0.3, 0.4]", "<image>", "a cup"]
    row = {
        "dataset": "gqa",
        "split": "train",
        "image": ["cot/gqa/1.jpg", "cot/gqa/1.jpg###[20, 40, 60, 80]"],
        "conversations": [{"from": "human", "value": value} for value in turns],
    }
    return row | changes


def with_turn(number: int, value: Any) -> dict[str, Any]:
    row = conversation()
    row["conversations"][number]["value"] = value
    return row


OWN = {
    "id": "a-7",
    "dataset": "a",
    "image": "7.png",
    "question": "What?",
    "answer": "cup",
    "boxes": [[0.1, 0.2, 0.3, 0.4]],
}


# --- real rows -------------------------------------------------------------------------------------------------------


@needs_samples
@pytest.mark.parametrize("name", NAMES)
def test_a_real_conversation_says_what_its_detection_row_says(name):
    found = read("viscot", SAMPLES / f"viscot/benchmark/{name}.json")
    misread = read("viscot", SAMPLES / f"viscot/benchmark/{name}.json", profile="published")
    for row, truth, annotation, published in zip(conversations(name), detections(name), found, misread, strict=True):
        assert annotation.error == published.error == ""
        assert annotation.sample_id == f"{row['dataset']}-{truth['question_id']}"
        assert (annotation.dataset, annotation.split) == (row["dataset"], "val")
        assert annotation.image == row["image"][0]
        assert annotation.question == truth["expression"].strip()
        assert annotation.answer == row["conversations"][3]["value"].strip()
        assert published.frame == "padded_square"
        assert [list(box) for box in published.boxes] == [json.loads(row["conversations"][1]["value"])]
        if truth["bbox"][1] < truth["height"]:  # one of these rows has a box below its image
            (box,) = pixels(annotation, truth["width"], truth["height"])
            assert box == pytest.approx(truth["bbox"], abs=1)


@needs_samples
@pytest.mark.parametrize("name", NAMES)
def test_a_real_detection_row_asks_for_its_box(name):
    for truth, annotation in zip(
        detections(name), read("viscot", SAMPLES / f"viscot/benchmark_det/{name}.jsonl"), strict=True
    ):
        assert annotation.error == ""
        assert annotation.sample_id == f"{name}-{truth['question_id']}"
        assert annotation.question == truth["expression"].strip() + REQUEST
        assert_box_is_answer(annotation, truth)


@needs_samples
@pytest.mark.parametrize("name", REC_FILES)
def test_a_real_referring_expression_is_asked_for_in_the_released_words(name):
    for truth, annotation in zip(lines(SAMPLES / "rec" / name), read("refcoco", SAMPLES / "rec" / name), strict=True):
        assert annotation.error == ""
        assert annotation.dataset == name.split("_")[1].replace("+", "plus")
        assert annotation.sample_id == f"{annotation.dataset}-{truth['sent_id']}"
        assert annotation.split == truth["split"]
        prompt = "Please provide the bounding box coordinate of the region this sentence describes: "
        assert annotation.question == f"{prompt}{truth['expression'].strip()}."
        assert_box_is_answer(annotation, truth)


def assert_box_is_answer(annotation: Annotation, truth: dict[str, Any]) -> None:
    width, height = truth["width"], truth["height"]
    assert (annotation.image, annotation.width, annotation.height) == (truth["img_path"], width, height)
    if truth["bbox"][1] < height:
        assert pixels(annotation, width, height) == [pytest.approx(truth["bbox"], abs=1)]
        told = json.loads(annotation.answer)
        assert told == pytest.approx([truth["bbox"][i] / (width, height)[i % 2] for i in range(4)], abs=6e-4)


# --- frames ----------------------------------------------------------------------------------------------------------

sides = st.integers(16, 5000)
spans = st.tuples(st.floats(0, 0.95), st.floats(0.01, 1)).map(lambda pair: (pair[0], pair[0] + pair[1] * (1 - pair[0])))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(width=sides, height=sides, x=spans, y=spans)
def test_a_box_is_the_same_in_every_format(tmp_path, width, height, x, y):
    box = (x[0], y[0], x[1], y[1])
    box_px = [box[0] * width, box[1] * height, box[2] * width, box[3] * height]
    size = {"width": width, "height": height}
    square = str(list(image_to_padded_square(box, width, height)))
    xywh = [box_px[0], box_px[1], box_px[2] - box_px[0], box_px[3] - box_px[1]]
    coco = {
        "images": [{"id": 1, "file_name": "1.png", **size}],
        "annotations": [{"image_id": 1, "category_id": 2, "bbox": xywh}],
        "categories": [{"id": 2, "name": "cup"}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    expression = {"expression": "cup", "bbox": box_px, "img_path": "1.png", **size}
    counted = {"question": "How many?", "answer": 1, "image": "1.png", "bboxs": [box_px], **size}
    fractions = with_turn(1, square) | {"image": ["1.png"]}
    found = [
        *read("jsonl", jsonl(tmp_path / "own.jsonl", [OWN | {"boxes": [box]}])),
        *read(
            "viscot", array(tmp_path / "viscot.json", [fractions, with_turn(1, "") | {"image": f"1.png###{box_px}"}])
        ),
        *read("viscot", jsonl(tmp_path / "detection.jsonl", [expression])),
        *read("refcoco", tmp_path / "detection.jsonl"),
        *read("tallyqa", jsonl(tmp_path / "counted.jsonl", [counted])),
        *read("coco", tmp_path / "coco.json"),
    ]
    assert Counter(annotation.frame for annotation in found) == {"image": 1, "padded_square": 1, "pixels": 5}
    for annotation in found:
        assert annotation.error == ""
        assert pixels(annotation, width, height) == [pytest.approx(box_px, abs=1e-6 * max(width, height))]
    (misread,) = read("viscot", array(tmp_path / "viscot.json", [fractions]), profile="published")
    assert misread.boxes == (pytest.approx(json.loads(square)),)


@pytest.mark.parametrize(
    ("profile", "string", "mark", "frame", "boxes", "error"),
    [
        ("corrected", "[0.1, 0.2, 0.3, 0.4]", "###[20, 40, 60, 80]", "pixels", ((20, 40, 60, 80),), ""),
        ("published", "[0.1, 0.2, 0.3, 0.4]", "###[20, 40, 60, 80]", "padded_square", ((0.1, 0.2, 0.3, 0.4),), ""),
        ("corrected", "[0.1, 0.2, 0.3, 0.4]", "", "padded_square", ((0.1, 0.2, 0.3, 0.4),), ""),
        ("published", "nowhere", "###[20, 40, 60, 80]", "pixels", ((20, 40, 60, 80),), ""),
        (
            "corrected",
            "[[0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1]]",
            "",
            "padded_square",
            ((0.1, 0.2, 0.3, 0.4), (0, 0, 1, 1)),
            "",
        ),
        ("corrected", "nowhere", "", "padded_square", (), "boxes_missing"),
        ("corrected", "[0.1, 0.2, 0.3]", "", "padded_square", (), "boxes_invalid"),
        ("corrected", "[a, b, c, d]", "", "padded_square", (), "boxes_invalid"),
        ("corrected", "[0.1, 0.2, 0.3, 1e999]", "", "padded_square", (), "boxes_invalid"),
    ],
)
def test_the_box_of_a_conversation(tmp_path, profile, string, mark, frame, boxes, error):
    row = with_turn(1, string) | {"image": ["cot/gqa/1.jpg", f"cot/gqa/1.jpg{mark}"]}
    (annotation,) = read("viscot", array(tmp_path / "train.json", [row]), profile=profile)
    assert (annotation.frame, annotation.boxes, annotation.error) == (frame, boxes, error)
    assert (annotation.image, annotation.question, annotation.answer) == ("cot/gqa/1.jpg", "What is it?", "a cup")


# --- formats ---------------------------------------------------------------------------------------------------------


def test_counting_questions_come_as_lines_or_as_an_array(tmp_path):
    rows = [
        {
            "question": f"How many {things}?",
            "answer": number,
            "image": f"VG_100K/{things}.jpg",
            "width": 640,
            "height": 480,
            "bboxs": [[10 * i, 20, 10 * i + 30, 90] for i in range(number)],
            "dataset": "tallyqa",
            "split": "train",
        }
        for number, things in enumerate(["dogs", "cats", "birds"], start=1)
    ]
    found = read("tallyqa", jsonl(tmp_path / "rows.jsonl", rows))
    assert read("tallyqa", array(tmp_path / "rows.json", rows)) == found
    assert [annotation.answer for annotation in found] == ["1", "2", "3"]
    assert found[2].boxes == ((0, 20, 30, 90), (10, 20, 40, 90), (20, 20, 50, 90))
    assert {annotation.question_type for annotation in found} == {"count"}
    assert len({annotation.sample_id for annotation in found}) == 3


def test_own_annotations_come_as_lines_or_as_parquet(tmp_path):
    rows = [
        OWN
        | {"split": "test", "question_type": "what", "names": ["cup"], "depth": "7_d.png", "width": 64, "height": 48},
        OWN | {"id": 8, "answer": 3, "boxes": [[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.6, 0.6]]},
        OWN | {"id": None, "names": ["one", "too many"]},
    ]
    found = read("jsonl", jsonl(tmp_path / "own.jsonl", rows))
    columns = [row | {"answer": str(row["answer"])} for row in rows]
    columns[1]["id"] = "a-8"  # a column has one type
    pq.write_table(pa.Table.from_pylist([dict.fromkeys(columns[0]) | row for row in columns]), tmp_path / "own.parquet")
    assert read("parquet", tmp_path / "own.parquet") == found
    assert [annotation.sample_id for annotation in found[:2]] == ["a-7", "a-8"]
    first = found[0]
    assert (first.split, first.question_type, first.names, first.depth) == ("test", "what", ("cup",), "7_d.png")
    assert (first.width, first.height, first.frame) == (64, 48, "image")
    assert found[1].answer == "3" and len(found[1].boxes) == 2
    assert found[2].sample_id.startswith("a-") and len(found[2].sample_id) > 10 and found[2].names == ()


def test_a_row_without_an_id_gets_one_from_what_it_says(tmp_path):
    rows = [
        conversation(),
        with_turn(3, "a mug"),
        with_turn(0, "Who?"),
        conversation(image=["cot/gqa/2.jpg"]),
        conversation(),
    ]
    ids = [annotation.sample_id for annotation in read("viscot", array(tmp_path / "train.json", rows))]
    assert len(set(ids)) == 4 and ids[0] == ids[4]
    assert [annotation.sample_id for annotation in read("viscot", jsonl(tmp_path / "train.jsonl", rows))] == ids


def test_categories_of_an_image_become_counting_questions(tmp_path):
    rng = random.Random(0)
    images = [{"id": 10 + i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(20)]
    categories = [{"id": 1, "name": "person"}, {"id": 5, "name": "box"}, {"id": 7, "name": "dog"}]
    annotations = [
        {
            "image_id": rng.choice(images)["id"],
            "category_id": rng.choice(categories)["id"],
            "bbox": [rng.randrange(300), rng.randrange(200), 50 + rng.random(), 60],
            "iscrowd": int(rng.random() < 0.1),
            "segmentation": [[1, 2, 3, 4]],
        }
        for _ in range(200)
    ]
    content = {"info": {}, "annotations": annotations, "images": images, "categories": categories}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    found = read("coco", tmp_path / "instances.json")
    expected = {}
    for image in images:
        for category in categories:
            objects = [
                item for item in annotations if (item["image_id"], item["category_id"]) == (image["id"], category["id"])
            ]
            if objects and not any(item["iscrowd"] for item in objects):
                corners = [(x, y, x + w, y + h) for x, y, w, h in (item["bbox"] for item in objects)]
                expected[f"instances-{image['id']}-{category['id']}"] = (category["name"], image["file_name"], corners)
    assert {item.sample_id: (item.names[0], item.image, list(item.boxes)) for item in found} == expected
    assert len(found) == len(expected) < 60  # some have a crowd
    for item in found:
        assert item.answer == str(len(item.boxes)) == str(len(item.names))
        plural = {"person": "people", "box": "boxes", "dog": "dogs"}[item.names[0]]
        assert item.question == f"How many {plural} are there?"
        assert (item.width, item.height, item.frame, item.error) == (640, 480, "pixels", "")


def test_what_is_wrong_in_a_file_like_those_of_coco_is_a_row_too(tmp_path):
    content = {
        "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2}, "x"],
        "categories": [{"id": 1, "name": "cup"}],
        "annotations": [
            {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3]},
            {"image_id": 2, "category_id": 1, "bbox": [1, 2, 3, 4]},
            {"image_id": 9, "category_id": 1, "bbox": [1, 2, 3, 4]},
            {"image_id": 1, "category_id": [], "bbox": [1, 2, 3, 4]},
            5,
        ],
    }
    (tmp_path / "c.json").write_text(json.dumps(content))
    found = {annotation.sample_id: annotation.error for annotation in read("coco", tmp_path / "c.json")}
    assert found == {
        "c-1-1": "boxes_invalid",
        "c-2-1": "image_missing",
        "c.json:annotations:3": "reference_unknown",
        "c.json:annotations:4": "reference_unknown",
        "c.json:annotations:5": "reference_unknown",
    }


# --- bad input -------------------------------------------------------------------------------------------------------

WORDS = {"image_missing", "question_empty", "boxes_missing", "boxes_invalid", "answer_empty", "json_broken"}


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (b'{"id": "a-7", "dataset": "a", "image": "7.png", "quest', "json_broken"),
        (b"[1, 2]", "json_broken"),
        (b"\xff\xfe\x00", "json_broken"),
        (b"[" * 100_000, "json_broken"),
        (b'{"id": ' + b"9" * 5000 + b"}", "json_broken"),
        ({**OWN, "image": None}, "image_missing"),
        ({**OWN, "image": ["7.png"]}, "image_missing"),
        ({**OWN, "image": "\ud800.png"}, "image_missing"),
        ({**OWN, "question": "  "}, "question_empty"),
        ({**OWN, "question": {"en": "What?"}}, "question_empty"),
        ({key: OWN[key] for key in OWN if key != "answer"}, "answer_empty"),
        ({**OWN, "answer": True}, "answer_empty"),
        ({**OWN, "boxes": []}, "boxes_missing"),
        ({**OWN, "boxes": [0.1, 0.2, 0.3, 0.4]}, "boxes_invalid"),
        ({**OWN, "boxes": [[0.1, 0.2, "0.3", 0.4]]}, "boxes_invalid"),
        (json.dumps(OWN).replace("0.4", "NaN").encode(), "boxes_invalid"),
        ({**OWN, "boxes": "[[0.1, 0.2, 0.3, 0.4]]"}, "boxes_invalid"),
    ],
)
def test_a_bad_row_says_why_and_the_others_go_on(tmp_path, row, error):
    good = OWN | {"id": "a-8"}
    bad, other = read("jsonl", jsonl(tmp_path / "own.jsonl", [row, good]))
    assert (bad.error, other.error, other.sample_id) == (error, "", "a-8")
    assert bad.sample_id == ("own.jsonl:1" if error == "json_broken" else "a-7")
    pa.Table.from_pylist([annotation_to_row(bad)], schema=ANNOTATION_SCHEMA)  # it can be written


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=60) | st.just(json.dumps(OWN).encode())))
def test_lines_of_any_bytes_never_stop_a_file(tmp_path, contents):
    good = json.dumps(OWN).encode()
    rows = [good, *(content.replace(b"\n", b"") for content in contents)]
    found = read("jsonl", jsonl(tmp_path / "own.jsonl", rows))
    assert sum(not annotation.error for annotation in found) == rows.count(good)
    assert {annotation.error for annotation in found} <= WORDS | {""}
    assert len(found) == sum(bool(row.strip()) for row in rows)
    broken = {f"own.jsonl:{number}" for number, row in enumerate(rows, start=1) if row.strip() and row[:1] != b"{"}
    assert broken <= {annotation.sample_id for annotation in found}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_fields_of_any_kind_make_a_row(tmp_path, data):
    template, source = data.draw(
        st.sampled_from(
            [
                (OWN, "jsonl"),
                (conversation(), "viscot"),
                ({"expression": "cup", "bbox": [1, 2, 3, 4], "img_path": "1.png", "width": 9, "height": 9}, "refcoco"),
                ({"question": "How many?", "answer": 1, "image": "1.png", "bboxs": [[1, 2, 3, 4]]}, "tallyqa"),
            ]
        )
    )
    row = {key: data.draw(VALUES) if data.draw(st.booleans()) else value for key, value in template.items()}
    (found,) = read(source, jsonl(tmp_path / "rows.jsonl", [row]))
    assert found.error in WORDS | {""}
    if not found.error:
        assert found.image and found.question and found.answer and found.boxes
    pa.Table.from_pylist([annotation_to_row(found)], schema=ANNOTATION_SCHEMA)


@pytest.mark.parametrize(
    ("source", "content", "words"),
    [
        ("viscot", json.dumps([OWN]), ["source 'viscot'", "conversations", "row 1 has id, dataset"]),
        ("jsonl", "image,question\n7.png,What?\n", ["source 'jsonl'", "row 1 is no JSON object"]),
        ("jsonl", "", ["it is empty"]),
        ("tallyqa", "\n\n" + json.dumps(OWN), ["bboxs", "row 3 has id"]),
        ("parquet", json.dumps(OWN), ["no Parquet file"]),
        ("coco", json.dumps([OWN]), ["nothing in the field 'categories'"]),
        ("coco", json.dumps(OWN) + "\n" + json.dumps(OWN), ["broken"]),
        ("viscot", json.dumps([conversation()] * 3)[:-1], ["broken after 3 elements", "premature EOF"]),
        ("viscot", json.dumps([conversation()] * 3)[:-9], ["broken after 2 elements"]),
        ("viscot", "[" + json.dumps(conversation()) + ", oops", ["broken after 1 elements"]),
        ("jsonl", "x" * 2**24, ["line 1 has 16777216 bytes or more"]),
    ],
)
def test_a_file_of_another_format_is_refused_with_what_was_found(tmp_path, source, content, words):
    (tmp_path / "rows").write_text(content)
    with pytest.raises(ConfigError) as error:
        read(source, tmp_path / "rows")
    for word in [f"input = '{tmp_path / 'rows'}'", *words]:
        assert word in str(error.value)


def test_files_are_named_one_by_one_by_patterns_or_packed(tmp_path):
    for name in ("b", "a"):
        jsonl(tmp_path / f"{name}.jsonl", [OWN | {"id": f"{name}-1", "dataset": name}])
    (tmp_path / "c.jsonl.gz").write_bytes(
        gzip.compress(b"\xef\xbb\xbf" + json.dumps({**OWN, "dataset": None}).encode())
    )
    by_pattern = read("jsonl", tmp_path / "*.jsonl*")
    assert [annotation.sample_id for annotation in by_pattern] == ["a-1", "b-1", "a-7"]
    assert by_pattern[2].dataset == "c"
    assert read("jsonl", tmp_path / "a.jsonl", tmp_path / "[b].jsonl", tmp_path / "c.jsonl.gz") == by_pattern
    for place, words in {
        "d.jsonl": "no such file",
        "*.json": "no such file",
        "x/*.jsonl": "no such file",
        "": "is a folder",
    }.items():
        with pytest.raises(ConfigError, match=words):
            read("jsonl", tmp_path / place)
    (tmp_path / "c.jsonl.gz").write_bytes((tmp_path / "c.jsonl.gz").read_bytes()[:-12])
    for source in ("jsonl", "coco"):
        with pytest.raises(ConfigError, match="cannot be read"):
            read(source, tmp_path / "c.jsonl.gz")


# --- streaming -------------------------------------------------------------------------------------------------------


def test_a_large_array_is_streamed(tmp_path):
    row = json.dumps(conversation())
    num_rows = 50_000_000 // len(row)
    with (tmp_path / "train.json").open("w") as file:
        file.write("[" + row)
        for _ in range(num_rows - 1):
            file.write(",\n" + row)
        file.write("]")
    process = psutil.Process(os.getpid())
    before, most = process.memory_info().rss, 0
    count = 0
    source = make_source(GenerateConfig(source="viscot", input=[str(tmp_path / "train.json")]))
    for count, _ in enumerate(source.annotations(), start=1):
        if count % 5000 == 0:
            most = max(most, process.memory_info().rss)
    assert count == num_rows
    assert most - before < 25e6  # the parsed list would take several times the file


def test_annotations_and_pictures_come_from_an_object_store():
    with object_store() as store:
        folder = Folder.open(store.url("own"))
        folder.write("a.jsonl", json.dumps(OWN).encode())
        folder.child("photos").write("7.png", b"picture")
        config = GenerateConfig(source="jsonl", input=[store.url("own/*.jsonl")], images=store.url("own/photos"))
        source = make_source(config)
        (annotation,) = source.annotations()
        assert pickle.loads(pickle.dumps(source)).open(annotation).image == b"picture"
        folder.child("photos").remove("7.png")
        with pytest.raises(PhotoError) as error:
            source.open(annotation)
        assert error.value.reason == "image_missing"
        with pytest.raises(ConfigError, match="no such folder"):
            read("jsonl", store.url("own/a.jsonl"), images=store.url("elsewhere"))


@pytest.mark.slow  # the client tries again for ten seconds
def test_a_store_that_fails_is_no_picture_that_is_missing():
    with object_store() as store:
        Folder.open(store.url("photos")).write("7.png", b"picture")
        folder = PictureFolder.of(store.url("photos"))
        assert folder.read("7.png") == b"picture"
    with pytest.raises(OSError):
        folder.read("7.png")


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    (folder / "cot/gqa").mkdir(parents=True)
    (folder / "cot/gqa/1.jpg").write_bytes(b"picture")
    (tmp_path / "secret.png").write_bytes(b"secret")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "cot/gqa/2.jpg",
        "cot/gqa",
        "cot/gqa/1.jpg/2.jpg",
        "a\0b",
        "x" * 300,
        "../secret.png",
        "cot/../../secret.png",
        "/etc/hosts",
    ],
)
def test_a_name_without_a_picture_is_refused(photos, name):
    with pytest.raises(PhotoError) as error:
        PictureFolder.of(str(photos)).read(name)
    assert error.value.reason == "image_missing"


def test_pictures_are_found_from_anywhere(photos, monkeypatch):
    monkeypatch.chdir(photos.parent)
    relative, free = PictureFolder.of("photos"), PictureFolder.of("")
    monkeypatch.chdir("/")
    assert relative.read("cot/gqa/1.jpg") == b"picture"
    assert free.read(f"{photos}/cot/gqa/1.jpg") == b"picture"
    monkeypatch.chdir(photos)
    assert free.read("cot/gqa/1.jpg") == b"picture"
    with pytest.raises(ConfigError, match="no such folder"):
        PictureFolder.of("elsewhere").check()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_of_a_picture_is_that_of_the_decoded_one(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (60, 40), "red").save(tmp_path / "1.jpg", exif=exif)
    folder = PictureFolder.of(str(tmp_path))
    assert folder.size_px("1.jpg") == decode(folder.read("1.jpg")).size
    (tmp_path / "2.jpg").write_bytes((tmp_path / "1.jpg").read_bytes()[:20])
    with pytest.raises(PhotoError) as error:
        folder.size_px("2.jpg")
    assert error.value.reason == "image_unreadable"


# --- depth that comes with a picture ---------------------------------------------------------------------------------


def encoded(pixels: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def depth_of(picture: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(colour_depth(picture))) as image:
        return depth_code.decode(np.asarray(image.convert("RGB")))


def test_given_depth_is_near_at_zero_in_every_form():
    depth_rel = np.linspace(0, 1, 64).reshape(8, 8).round(2)
    gray = np.rint(depth_rel * 255).astype(np.uint8)
    for picture in (gray, np.stack([gray] * 3, axis=2), depth_code.encode(depth_rel)):
        np.testing.assert_allclose(depth_of(encoded(picture)), depth_rel, atol=1 / 255)
    distance_mm = np.array([[500, 1000], [0, 2000]], np.uint16)  # one was not measured
    found = depth_of(encoded(distance_mm))
    assert found[1, 0] in (found[0, 0], found[1, 1])
    found[1, 0] = 0
    inverse = 1 / distance_mm.clip(500).astype(float)
    expected = (inverse.max() - inverse) / (inverse.max() - inverse[1, 1])
    np.testing.assert_allclose(found, expected, atol=1 / 255)
    metres = np.array([[0.5, 1.0], [np.nan, 2.0]], np.float32)
    np.testing.assert_array_equal(depth_of(encoded(metres, "TIFF"))[:, 1], found[:, 1])


@pytest.mark.parametrize(
    "picture", [b"", b"\x89PNG", encoded(np.zeros((4, 4), np.uint16)), encoded(np.full((9, 9), 7, np.uint8), "JPEG")]
)
def test_depth_that_cannot_be_read_is_said(picture):
    with pytest.raises(PhotoError) as error:
        colour_depth(picture)
    assert error.value.reason == "depth_unreadable"


def test_depth_comes_with_the_picture_of_its_annotation(tmp_path):
    (tmp_path / "7.png").write_bytes(b"picture")
    (tmp_path / "7_d.png").write_bytes(encoded(np.eye(4, dtype=np.uint8)))
    rows = jsonl(tmp_path / "own.jsonl", [OWN | {"depth": "7_d.png"}, OWN | {"depth": "8_d.png"}, OWN])
    source = make_source(GenerateConfig(source="jsonl", input=[str(rows)], images=str(tmp_path)))
    measured, missing, plain = source.annotations()
    picture = source.open(measured)
    assert (picture.image, picture.depth_source) == (b"picture", "measured")
    assert picture.depth_image == colour_depth((tmp_path / "7_d.png").read_bytes())
    assert source.open(plain).depth_source == "" == source.open(plain).depth_image.decode()
    with pytest.raises(PhotoError) as error:
        source.open(missing)
    assert error.value.reason == "depth_missing"
