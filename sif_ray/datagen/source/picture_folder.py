"""Pictures that annotations name, in a folder or in an object store."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.fs as pafs

from sif_ray.config import ConfigError
from sif_ray.datagen import pictures
from sif_ray.datagen.pictures import PhotoError
from sif_ray.storage import Folder, reach


@dataclass(frozen=True)
class PictureFolder:
    """Where pictures lie. A name leads to nothing outside of it."""

    place: str  # absolute path or URL; "" = the names are paths or URLs themselves

    @classmethod
    def of(cls, images: str) -> PictureFolder:
        """The folder of the key `images`; a relative path begins where this process works, wherever a worker is."""
        is_path = images and "://" not in images
        return cls(str(Path(images).expanduser().absolute()) if is_path else images)

    def check(self) -> None:
        """Raise `ConfigError` where there is no such folder."""
        if self.place and reach(self.place, "images")[1].type != pafs.FileType.Directory:
            raise ConfigError(f"images = {self.place!r}: there is no such folder")

    def read(self, name: str, kind: str = "image") -> bytes:
        """A picture as it came.

        Raises `PhotoError` (`<kind>_missing` or `<kind>_unreadable`) for what is wrong with this one, and `OSError` for
        a store or a disk that fails.
        """
        with self._found(name, kind) as (filesystem, path), filesystem.open_input_file(path) as file:
            content: bytes = file.read()
        return content

    def size_px(self, name: str) -> tuple[int, int]:
        """Width and height of a picture, from its header. Raises as `read`."""
        with self._found(name, "image") as (filesystem, path), filesystem.open_input_file(path) as file:
            return pictures.size_px(file)

    @contextmanager
    def _found(self, name: str, kind: str) -> Iterator[tuple[pafs.FileSystem, str]]:
        """The place of a picture that is opened inside."""
        folder, path = self._locate(name, kind)
        try:
            yield folder.filesystem, path
        except (FileNotFoundError, NotADirectoryError, pa.ArrowInvalid) as error:
            raise PhotoError(f"{kind}_missing", str(error)) from error
        except PermissionError as error:
            raise PhotoError(f"{kind}_unreadable", str(error)) from error
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG and _is_file(folder, path):
                raise
            raise PhotoError(f"{kind}_missing", str(error)) from error

    def _locate(self, name: str, kind: str) -> tuple[Folder, str]:
        if not self.place:
            parent, slash, name = name.rpartition("/")
            folder = _folder(parent or slash or ".")
        elif name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise PhotoError(f"{kind}_missing", f"{name!r} lies outside of images = {self.place!r}")
        else:
            folder = _folder(self.place)
        return folder, folder.path_of(name)


def _is_file(folder: Folder, path: str) -> bool:
    return bool(folder.filesystem.get_file_info(path).type == pafs.FileType.File)


@lru_cache(maxsize=64)
def _folder(place: str) -> Folder:
    return Folder.open(place, "images")
