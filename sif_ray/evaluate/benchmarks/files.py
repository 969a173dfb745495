"""Annotation files as rows that know where they stand, so that a wrong one can be told by file, line and field.

Every reader streams: JSON lines, a JSON array, Parquet and tab-separated text.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TextIO

from sif_ray.config import ConfigError
from sif_ray.method.boxes import Box, BoxError, as_rectangle

_CHUNK_CHARS = 1 << 20
_BATCH_ROWS = 64  # of Parquet; a row may hold images
_FIELD_CHARS = 2**31 - 1  # of tab-separated text; MMBench holds images in it
_DECODER = json.JSONDecoder()
_OWN_IDS = ("question_id", "sent_id", "idx", "index", "id")


@dataclass(frozen=True)
class Row:
    """One row. Its readers raise `ConfigError` with file, place and field."""

    path: Path
    place: str  # "line 7" or, where a format has no lines, "row 6", counted from 0
    position: int  # 0-based, in the file
    fields: dict[str, Any]

    @property
    def own_id(self) -> str:
        """The row's id as text: its own, else its position."""
        own = (self.fields[name] for name in _OWN_IDS if self.fields.get(name) is not None)
        return str(next(own, self.position))

    def error(self, field: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.path}, {self.place}: field {field!r} {problem}")

    def has(self, field: str) -> bool:
        return self.fields.get(field) is not None

    def value(self, field: str) -> Any:
        if not self.has(field):
            raise self.error(field, f"is missing; the row has {', '.join(self.fields) or 'none'}")
        return self.fields[field]

    def text(self, field: str) -> str:
        """A string that is not blank, as it stands."""
        value = self.value(field)
        if not isinstance(value, str) or not value.strip():
            raise self.error(field, f"is {value!r:.80}; expected a text")
        return value

    def whole(self, field: str, minimum: int) -> int:
        """A whole number, or a text that is one."""
        value = self.value(field)
        try:
            number = int(value) if isinstance(value, str | int) and not isinstance(value, bool) else None
        except ValueError:
            number = None
        if number is None or number < minimum:
            raise self.error(field, f"is {value!r:.80}; expected a whole number from {minimum} on")
        return number

    def texts(self, field: str, minimum: int) -> tuple[str, ...]:
        """A list of at least `minimum` strings."""
        value = self.value(field)
        if not isinstance(value, list) or len(value) < minimum or not all(isinstance(text, str) for text in value):
            raise self.error(field, f"is {value!r:.80}; expected a list of at least {minimum} texts")
        return tuple(value)

    def one_of(self, field: str, allowed: tuple[str, ...]) -> str:
        value = self.text(field)
        if value not in allowed:
            raise self.error(field, f"is {value!r:.80}; expected one of {', '.join(allowed)}")
        return value

    def picture(self, field: str) -> bytes:
        """The encoded image that the row holds: bytes, base64, {"bytes": ...}, or the first of a list of them.

        b"" where there is none, as for a text that is a name.
        """
        value = self.fields.get(field)
        if isinstance(value, list):
            value = next(iter(value), None)
        if isinstance(value, dict):
            value = value.get("bytes")
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                return base64.b64decode(value, validate=True)
        return value if isinstance(value, bytes) else b""

    def box_xyxy_px(self, field: str) -> Box:
        """Four numbers with x1 < x2 and y1 < y2."""
        try:
            x1, y1, x2, y2 = box = as_rectangle(self.value(field), field)
        except BoxError as error:
            raise self.error(field, f"is no box: {error}") from error
        if x2 <= x1 or y2 <= y1:
            raise self.error(field, f"is {list(box)}; expected [x1, y1, x2, y2] with x1 < x2 and y1 < y2")
        return box


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a .jsonl, .json (array or lines), .parquet or .tsv file, in order."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"{path}: unknown kind of file; expected one of {', '.join(_READERS)}")
    position, place = -1, "the start"
    try:
        for position, (place, fields) in enumerate(reader(path)):
            if not isinstance(fields, dict):
                raise ConfigError(f"{path}, {place}: {fields!r:.80} is not an object with fields")
            yield Row(path, place, position, fields)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}, after {place}: not UTF-8 ({error.reason})") from error
    if position < 0:
        raise ConfigError(f"{path}: holds no row")


def load_object(path: Path) -> dict[str, Any]:
    """A JSON file whose content is one object, read whole."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected one JSON object, not a {type(found).__name__}")
    return found


def object_rows(path: Path, content: dict[str, Any], field: str) -> list[Row]:
    """The rows of the list `field` of a JSON file that is one object."""
    rows = content.get(field)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{path}: field {field!r} is not a list of objects")
    return [Row(path, f"{field}[{position}]", position, row) for position, row in enumerate(rows)]


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """A JSON array or, as some benchmarks name them, JSON lines."""
    with path.open(encoding="utf-8") as file:
        blank = first = ""
        while first.isspace() or not first:
            first = file.read(1)
            if not first:
                return
            blank += first
        yield from _array(path, file, 1 + blank.count("\n")) if first == "[" else _jsonl(path)


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from error


def _array(path: Path, file: TextIO, line: int) -> Iterator[tuple[str, Any]]:
    """The elements of an array whose opening bracket was read, each with the line on which it begins."""
    text, at = "", 0
    for number in count():
        while True:
            while at < len(text) and (text[at].isspace() or (text[at] == "," and number)):
                line += text[at] == "\n"
                at += 1
            try:
                if at < len(text) and text[at] == "]":
                    return
                element, end = _DECODER.raw_decode(text, at)
                break
            except json.JSONDecodeError as error:
                more = file.read(_CHUNK_CHARS)
                if not more:
                    place = line + text.count("\n", at, error.pos)
                    raise ConfigError(f"{path}, line {place}: not JSON ({error.msg})") from error
                text, at = text[at:] + more, 0
        yield f"line {line}", element
        line += text.count("\n", at, end)
        at = end


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    numbers = count()
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH_ROWS):
                yield from ((f"row {next(numbers)}", row) for row in batch.to_pylist())
    except pa.ArrowException as error:
        raise ConfigError(f"{path}: not Parquet ({error})") from error


def _tsv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(_FIELD_CHARS)
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", strict=True)
        try:
            for row in rows:
                if None in row:
                    raise ConfigError(f"{path}, line {rows.line_num}: more values than the header has columns")
                yield f"line {rows.line_num}", {name: value or None for name, value in row.items()}
        except csv.Error as error:
            raise ConfigError(f"{path}, line {rows.line_num}: not tab-separated text ({error})") from error


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".tsv": _tsv,
}
