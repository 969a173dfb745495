"""The file through which an actor hands an update to the worker processes of its engine.

The engine's workers are no Ray processes, so they cannot read the object store. The actor copies the buckets into one
file in shared memory; every worker maps it. The file has a name only while the workers open it.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sif_ray.rollout.errors import WeightSyncError
from sif_ray.rollout.weights import (
    ALIGNMENT_BYTES,
    ByteArray,
    TensorSpec,
    specs_from_rows,
    specs_to_rows,
)

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")

Manifest = dict[str, Any]
"""Plain description of a staged update: version, path, tensors (rows) and buckets ([start, size] in bytes)."""


def staging_folder(num_bytes: int, shared_memory: Path = SHARED_MEMORY) -> Path:
    """Shared memory when `num_bytes` fit into what is free there, else the folder for temporary files.

    Containers often get 64 MiB of shared memory; the other folder works as well, at the speed of its disk.
    """
    if shared_memory.is_dir() and os.access(shared_memory, os.W_OK):
        free = shutil.disk_usage(shared_memory).free
        if num_bytes <= free:
            return shared_memory
        logger.warning(
            "%s has %d bytes free, the weight update needs %d: staged in %s instead; more shared memory is faster",
            shared_memory,
            free,
            num_bytes,
            tempfile.gettempdir(),
        )
    return Path(tempfile.gettempdir())


def staged_size(buckets: Sequence[ByteArray]) -> int:
    """Bytes of the file that holds `buckets`."""
    return sum(_aligned(bucket.nbytes) for bucket in buckets)


@contextmanager
def staging_file(num_bytes: int) -> Iterator[Path]:
    """An empty file with room for `num_bytes`, removed at exit whatever happened; who mapped it keeps its bytes.

    Raises `WeightSyncError` when there is no room.
    """
    folder = staging_folder(num_bytes)
    handle, name = tempfile.mkstemp(prefix="sif_ray_weights_", dir=folder)
    try:
        try:
            os.posix_fallocate(handle, 0, max(num_bytes, 1))
        except OSError as error:
            raise WeightSyncError(f"no room for a weight update of {num_bytes} bytes in {folder}: {error}") from error
        finally:
            os.close(handle)
        yield Path(name)
    finally:
        os.unlink(name)


def write_staged(path: Path, version: int, specs: Iterable[TensorSpec], buckets: Sequence[ByteArray]) -> Manifest:
    """Copy `buckets` into a staging file, one after the other, and describe where they are."""
    places = []
    start = 0
    with path.open("r+b") as file:
        for bucket in buckets:
            file.seek(start)
            file.write(np.ascontiguousarray(bucket))
            places.append([start, bucket.nbytes])
            start += _aligned(bucket.nbytes)
    return {"version": version, "path": str(path), "tensors": specs_to_rows(specs), "buckets": places}


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def open_staged(manifest: Mapping[str, Any]) -> tuple[list[TensorSpec], list[ByteArray]]:
    """Specs and mapped buckets of a manifest. The mapping is private and outlives the file's name."""
    data = np.asarray(np.memmap(manifest["path"], dtype=np.uint8, mode="c"))
    buckets = [data[start : start + size] for start, size in manifest["buckets"]]
    return specs_from_rows(manifest["tensors"]), buckets
