"""Rows know where they stand, whatever the kind of file."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sif_ray.config import ConfigError
from sif_ray.evaluate.benchmarks import files
from sif_ray.evaluate.benchmarks.files import Row, object_rows, read_rows

NAMES = st.text(min_size=1, max_size=5)
OBJECTS = st.lists(
    st.dictionaries(NAMES, st.one_of(st.integers(), st.text(), st.lists(st.floats(-1, 1))), max_size=4),
    min_size=1,
    max_size=6,
)


@settings(deadline=None)
@given(OBJECTS, st.sampled_from([None, 0, 1, 3]), st.integers(1, 60))
def test_a_streamed_array_is_what_json_reads_with_the_line_of_each_row(rows, indent, chunk):
    text = "\n " + json.dumps(rows, indent=indent) + "\n"
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_CHUNK_CHARS", chunk)  # rows that cross the chunks
        path = Path(folder) / "rows.json"
        path.write_text(text, encoding="utf-8", newline="")
        found = list(read_rows(path))
    assert [row.fields for row in found] == rows
    assert [row.position for row in found] == list(range(len(rows)))
    lines = text.split("\n")
    for row in found:
        assert "{" in lines[int(row.place.removeprefix("line ")) - 1]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("rows.jsonl", '{"a": 1}\n\n{"a": \n', "line 3: not JSON"),
        ("rows.jsonl", "[1]\n", "line 1: \\[1\\] is not an object"),
        ("rows.jsonl", "", "holds no row"),
        ("rows.json", "", "holds no row"),
        ("rows.json", "[]", "holds no row"),
        ("rows.json", '[\n{"a": 1},\n{"a" 2}\n]', "line 3: not JSON"),
        ("rows.json", '[\n{"a": 1},\n\n{"a": 2}\n', "line 5: not JSON"),
        ("rows.json", '[\n{"a": 1},\n7]', "line 3: 7 is not an object"),
        ("rows.json", '{"a": 1}\n{"a"', "line 2: not JSON"),
        ("rows.tsv", "a\tb\n1\t2\t3\n", "line 2: more values"),
        ("rows.parquet", "PAR1", "not Parquet"),
        ("rows.txt", "a", "unknown kind"),
    ],
)
def test_a_broken_file_is_told_by_line(tmp_path, name, text, says):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"rows\.\w+(, )?.*{says}"):
        list(read_rows(path))


def test_bytes_that_are_no_text_are_told_by_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    with pytest.raises(ConfigError, match="not UTF-8"):
        list(read_rows(path))


def test_an_array_of_bytes_that_are_no_text_is_refused(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(ConfigError, match="not UTF-8"):
        list(read_rows(path))


def test_parquet_rows_stream_in_order(tmp_path):
    rows = [{"a": number, "b": [str(number)]} for number in range(150)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=40)
    found = list(read_rows(tmp_path / "rows.parquet"))
    assert [row.fields for row in found] == rows
    assert found[149].place == "row 149"


def row(**fields) -> Row:
    return Row(Path("file.jsonl"), "line 7", 6, fields)


@pytest.mark.parametrize(
    ("fields", "own_id"),
    [
        ({"question_id": 3, "id": 9}, "3"),
        ({"sent_id": 0}, "0"),
        ({"idx": 4}, "4"),
        ({"id": "x"}, "x"),
        ({}, "6"),
        ({"id": None}, "6"),
    ],
)
def test_own_ids(fields, own_id):
    assert row(**fields).own_id == own_id


@pytest.mark.parametrize(
    "read",
    [
        lambda: row().text("field"),
        lambda: row(field=" ").text("field"),
        lambda: row(field=3).text("field"),
        lambda: row(field="x").whole("field", 0),
        lambda: row(field=True).whole("field", 0),
        lambda: row(field=0).whole("field", 1),
        lambda: row(field=1.5).whole("field", 1),
        lambda: row(field=["a", 1]).texts("field", 0),
        lambda: row(field=["a"]).texts("field", 2),
        lambda: row(field="z").one_of("field", ("x", "y")),
        lambda: row(field=[1, 2, 3]).box_xyxy_px("field"),
        lambda: row(field=[1, 2, 1, 4]).box_xyxy_px("field"),
        lambda: row(field=[1, 2, float("nan"), 4]).box_xyxy_px("field"),
        lambda: row(field="[1, 2, 3, 4]").box_xyxy_px("field"),
    ],
)
def test_a_wrong_value_is_told_by_file_line_and_field(read):
    with pytest.raises(ConfigError, match=r"file\.jsonl, line 7: field 'field' "):
        read()


def test_rows_inside_an_object_are_told_by_their_index():
    [_, second] = object_rows(Path("f.json"), {"images": [{"id": 1}, {}]}, "images")
    with pytest.raises(ConfigError, match=r"f\.json, images\[1\]: field 'id' is missing"):
        second.value("id")
    with pytest.raises(ConfigError, match="'images' is not a list of objects"):
        object_rows(Path("f.json"), {"images": [3]}, "images")
