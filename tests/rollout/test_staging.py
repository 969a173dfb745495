"""The staging file carries an update to another process and is gone afterwards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sif_ray.rollout.errors import WeightSyncError
from sif_ray.rollout.staging import open_staged, staged_size, staging_file, staging_folder, write_staged
from sif_ray.rollout.weights import WeightUpdate, make_update, read_tensors

NAMED = [(f"layers.{i}.weight", torch.randn(3 + i, 5)) for i in range(4)]


def _update() -> WeightUpdate:
    return make_update(9, [NAMED[:1], NAMED[1:]])


def test_mapped_tensors_outlive_the_file_name() -> None:
    update = _update()
    with staging_file(staged_size(update.buckets)) as path:
        specs, buckets = open_staged(write_staged(path, update.version, update.tensors, update.buckets))
    assert not path.exists()
    for (name, tensor), (read_name, read) in zip(NAMED, read_tensors(specs, buckets), strict=True):
        assert name == read_name
        assert torch.equal(tensor, read)


def test_the_file_is_removed_after_an_error() -> None:
    seen: list[Path] = []
    with pytest.raises(RuntimeError, match="boom"), staging_file(128) as path:
        seen.append(path)
        raise RuntimeError("boom")
    assert not seen[0].exists()


def test_bytes_that_change_in_the_file_are_found() -> None:
    update = _update()
    with staging_file(staged_size(update.buckets)) as path:
        manifest = write_staged(path, update.version, update.tensors, update.buckets)
        with path.open("r+b") as file:
            file.seek(manifest["buckets"][1][0])
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 16]))
        specs, buckets = open_staged(manifest)
        with pytest.raises(WeightSyncError, match=r"layers\.1\.weight: checksum"):
            list(read_tensors(specs, buckets))


def test_a_small_shared_memory_is_left_for_the_temporary_folder(tmp_path: Path) -> None:
    assert staging_folder(1, shared_memory=tmp_path) == tmp_path
    assert staging_folder(2**60, shared_memory=tmp_path) != tmp_path
    assert staging_folder(1, shared_memory=tmp_path / "absent") != tmp_path / "absent"


def test_no_room_is_said_before_anything_is_written() -> None:
    with pytest.raises(WeightSyncError, match="no room for a weight update"), staging_file(2**60):
        pass


def test_a_bucket_shared_read_only_can_be_staged() -> None:
    update = _update()
    for bucket in update.buckets:
        bucket.setflags(write=False)  # as Ray's object store gives them
    with staging_file(staged_size(update.buckets)) as path:
        specs, buckets = open_staged(write_staged(path, update.version, update.tensors, update.buckets))
    assert len(list(read_tensors(specs, buckets))) == len(NAMED)
    assert all(np.array_equal(a, b) for a, b in zip(buckets, update.buckets, strict=True))
