"""Folders on a local disk or in an object store, whose files are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from sif_ray.config import ConfigError

_PART = ".part"  # of a file that is being written; hidden, so that nothing lists it


@dataclass(frozen=True)
class Folder:
    """A folder that need not exist yet. It can be pickled, credentials in the environment stay there.

    Example: `Folder.open("s3://bucket/sif?region=eu-central-1").child("data").read("00000.parquet")`.
    """

    url: str  # as it was given, or the path
    filesystem: pafs.FileSystem
    path: str  # of the folder in `filesystem`, absolute

    @classmethod
    def open(cls, place: str | Path, field: str = "folder") -> Folder:
        """A path, or a URL that `pyarrow.fs` knows (s3://, gs://, ...), whose query has the options of the file system.

        Raises `ConfigError`, which begins with `field`, for a place that is unknown or cannot be reached, or is a file.
        """
        filesystem, found = reach(place, field)
        if found.type == pafs.FileType.File:
            raise ConfigError(f"{field} = {str(place)!r} is a file; name a folder")
        return cls(str(place), filesystem, found.path.rstrip("/"))

    @property
    def is_local(self) -> bool:
        """Whether it lies on a disk of this machine (or one that is mounted)."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def child(self, name: str) -> Folder:
        """The folder `name` in this one."""
        base, mark, query = self.url.partition("?") if "://" in self.url else (self.url, "", "")
        return Folder(f"{base.rstrip('/')}/{name}{mark}{query}", self.filesystem, self.path_of(name))

    def path_of(self, name: str) -> str:
        """The path of the file `name` in `filesystem`."""
        return f"{self.path}/{name}"

    def exists(self, name: str) -> bool:
        """Whether there is a file or a folder `name`."""
        return bool(self.filesystem.get_file_info(self.path_of(name)).type != pafs.FileType.NotFound)

    def names(self) -> list[str]:
        """The names of the files and folders in it, sorted; none where it does not exist."""
        found = self.filesystem.get_file_info(pafs.FileSelector(self.path, allow_not_found=True))
        return sorted(info.base_name for info in found if not info.base_name.startswith("."))

    def read(self, name: str) -> bytes:
        """The content of a file. Raises `FileNotFoundError`."""
        with self.filesystem.open_input_file(self.path_of(name)) as file:
            content: bytes = file.read()
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write a file: a reader sees all of `content` or what was there before, whenever the writer dies.

        An object store shows an object when its upload is complete; on a disk the file is renamed when it is.
        """
        if self.is_local:
            _write_local(Path(self.path_of(name)), content)
            return
        with self.filesystem.open_output_stream(self.path_of(name)) as file:
            file.write(content)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(self.path_of(name))

    def clear(self) -> None:
        """Remove everything in it."""
        self.filesystem.delete_dir_contents(self.path, missing_dir_ok=True)

    def read_json(self, name: str) -> Any:
        """The value in a JSON file. Raises `FileNotFoundError`."""
        return json.loads(self.read(name))

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` as strict JSON. Raises `ValueError` for a number that is not finite."""
        self.write(name, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())

    def check_writable(self, field: str = "folder") -> None:
        """Write a file and remove it. Raises `ConfigError` where that is not possible."""
        probe = f".probe-{uuid.uuid4().hex}"
        try:
            self.write(probe, b"sif_ray")
            self.remove(probe)
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"{field} = {self.url!r} cannot be written: {error}; choose another place") from error

    def remove_parts(self) -> None:
        """Remove what writers that were killed left here and in the folders below."""
        if self.is_local:
            for part in Path(self.path).rglob(f".*{_PART}"):
                part.unlink(missing_ok=True)


def reach(place: str | Path, field: str) -> tuple[pafs.FileSystem, pafs.FileInfo]:
    """The file system of a path or URL, and what is there, maybe nothing.

    Raises `ConfigError`, which begins with `field`, for a place that is unknown or cannot be reached.
    """
    url = str(place)
    try:
        if "://" in url:
            filesystem, path = pafs.FileSystem.from_uri(url)
        else:
            filesystem, path = pafs.LocalFileSystem(), str(Path(url).expanduser().absolute())
        return filesystem, filesystem.get_file_info(path)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{field} = {url!r} cannot be reached: {error}; check the address and the keys") from error


def _write_local(path: Path, content: bytes) -> None:
    """The name of the part is the writer's own: a task that was lost and its successor may write the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_PART}")
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a power failure could leave an empty file under the final name
        os.replace(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
