"""Checkpoint folders behind object-store URLs, copied once to a cache on this machine."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from pathlib import Path

from pyarrow import fs

from sif_ray.config import ConfigError
from sif_ray.storage import Folder

CACHE_ENV = "SIF_RAY_CACHE"  # folder of the cache; default ~/.cache/sif_ray


def fetch(url: str) -> Path:
    """A local copy of the folder at `url` (`sif_ray.storage.Folder`), made by the first process that asks.

    The copy is known by the names, sizes and times of the files, so that a changed checkpoint is fetched again. Raises
    `ConfigError` for a folder that is empty or cannot be reached.
    """
    remote = Folder.open(url, "policy")
    selector = fs.FileSelector(remote.path, recursive=True, allow_not_found=True)
    files = [found for found in remote.filesystem.get_file_info(selector) if found.type == fs.FileType.File]
    if not files:
        raise ConfigError(f"policy = {url!r} is empty or not there; name the folder that holds config.json")
    listing = sorted((found.path, found.size, found.mtime_ns) for found in files)
    digest = hashlib.sha256(repr((url, listing)).encode()).hexdigest()[:16]
    folder = Path(os.environ.get(CACHE_ENV, Path.home() / ".cache" / "sif_ray")) / "policies" / digest
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one copy per machine, however many actors ask
        if not folder.exists():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            fs.copy_files(
                remote.path, str(part), source_filesystem=remote.filesystem, destination_filesystem=fs.LocalFileSystem()
            )
            part.rename(folder)
    return folder
