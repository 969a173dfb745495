"""Annotation files as streams of rows: JSON arrays, JSON Lines and Parquet, local or in an object store."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import ijson
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from sif_ray.config import ConfigError
from sif_ray.storage import reach

Row = tuple[int, Mapping[str, Any] | None]
"""Number of the line or element, from 1, and its fields; None = no JSON object."""

BROKEN_JSON = (ijson.JSONError, UnicodeDecodeError)
"""What ijson raises for a broken file: its parser lets some bytes pass that Python does not take for UTF-8."""

_MAX_LINE_BYTES = 2**24  # of one annotation
_BATCH_ROWS = 1024
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class InputFile:
    """An annotation file that exists.

    Example: `InputFile(S3FileSystem(...), "bucket/viscot/viscot_363k.json")`.
    """

    filesystem: pafs.FileSystem
    path: str

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.path).name

    @property
    def stem(self) -> str:
        """The name without its ending: the dataset of annotations that name none."""
        return PurePosixPath(self.name.removesuffix(".gz")).stem

    @property
    def has_lines(self) -> bool:
        """Whether the name says that it is JSON Lines."""
        return self.name.removesuffix(".gz").endswith(".jsonl")

    @contextmanager
    def open(self) -> Iterator[io.BufferedReader]:
        """Its bytes, unpacked where the name ends in .gz. Inside, a file that cannot be read raises `ConfigError`."""
        try:
            with io.BufferedReader(self.filesystem.open_input_stream(self.path)) as stream:
                yield stream
        except OSError as error:
            raise ConfigError(f"input = {self.path!r} cannot be read: {error}") from error


def input_files(places: Iterable[str]) -> list[InputFile]:
    """The files that paths and URLs name; their last part may be a pattern such as `*.jsonl`.

    Raises `ConfigError` for one that names no file.
    """
    return [file for place in places for file in _files(place)]


def _files(place: str) -> list[InputFile]:
    filesystem, found = reach(place, "input")
    if found.type == pafs.FileType.File:
        return [InputFile(filesystem, found.path)]
    if found.type == pafs.FileType.Directory:
        raise ConfigError(f"input = {place!r} is a folder; name the files in it, e.g. {place.rstrip('/')}/*.jsonl")
    parent, _, pattern = found.path.rpartition("/")
    infos = filesystem.get_file_info(pafs.FileSelector(parent, allow_not_found=True))
    paths = [info.path for info in infos if info.type == pafs.FileType.File and fnmatch(info.base_name, pattern)]
    if not paths:
        raise ConfigError(f"input = {place!r}: there is no such file")
    return [InputFile(filesystem, path) for path in sorted(paths)]


def json_rows(file: InputFile) -> Iterator[Row]:
    """The objects of a JSON array, or of a file with one object per line, as which one called .jsonl is read.

    Blank lines are left out. A broken line is a row without fields. Raises `ConfigError` for a file that cannot be
    read, and where an array is broken or breaks off, as nothing can be told about what follows.
    """
    with file.open() as stream:
        if stream.peek(3)[:3] == _BYTE_ORDER_MARK:
            stream.read(3)
        if not file.has_lines and stream.peek(1).lstrip()[:1] == b"[":
            for number, element in enumerate(array_items(file, stream, "item"), start=1):
                yield number, element if isinstance(element, dict) else None
        else:
            yield from _line_rows(file, stream)


def array_items(file: InputFile, stream: BinaryIO, path: str) -> Iterator[Any]:
    """The elements of the array at `path` (as ijson writes it) of a JSON file, one in memory at a time.

    Raises `ConfigError` for a file that is broken or breaks off.
    """
    count = 0
    try:
        for item in ijson.items(stream, path, use_float=True):
            count += 1
            yield item
    except BROKEN_JSON as error:  # its further lines show the place in the file
        told = " ".join(str(error).split("\n")[0].split())
        raise ConfigError(f"input = {file.path!r} is broken after {count} elements of its array: {told}") from error


def _line_rows(file: InputFile, stream: BinaryIO) -> Iterator[Row]:
    number = 0
    while line := stream.readline(_MAX_LINE_BYTES):
        number += 1
        if len(line) == _MAX_LINE_BYTES:
            raise ConfigError(
                f"input = {file.path!r}: line {number} has {_MAX_LINE_BYTES} bytes or more; expected a JSON array, or "
                "one annotation per line"
            )
        if line.strip():
            yield number, _parsed(line)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def parquet_rows(file: InputFile) -> Iterator[Row]:
    """The rows of a Parquet file. Raises `ConfigError` for a file that is none or is damaged."""
    number = 0
    try:
        with file.filesystem.open_input_file(file.path) as stream:
            for batch in pq.ParquetFile(stream).iter_batches(batch_size=_BATCH_ROWS):
                for fields in batch.to_pylist():
                    number += 1
                    yield number, fields
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"input = {file.path!r} is no Parquet file, or broken after row {number}: {error}") from error
