"""What the cache of depth remembers, forgets and refuses to believe."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from sif_ray.depth.cache import DepthCache
from sif_ray.depth.encoding import gray_png
from sif_ray.storage import Folder

GRAYS = [gray_png(np.random.default_rng(seed).random((8, 8))) for seed in range(3)]
KEYS = [f"{number:064x}" for number in range(3)]


def test_the_memory_is_bounded_and_forgets_what_was_not_used_for_longest():
    size = len(GRAYS[0])
    cache = DepthCache("model", memory_bytes=2 * size)
    assert [cache.get(key) for key in KEYS] == [None] * 3
    for key, gray in zip(KEYS[:2], GRAYS[:2], strict=True):
        cache.put(key, gray)
    assert cache.get(KEYS[0]) == GRAYS[0]
    cache.put(KEYS[2], GRAYS[2])
    assert [cache.get(key) for key in KEYS] == [GRAYS[0], None, GRAYS[2]]
    cache.put(KEYS[2], GRAYS[1])  # again: held once
    assert [cache.get(key) for key in KEYS] == [GRAYS[0], None, GRAYS[1]]


def test_the_folder_remembers_for_the_same_model_alone(tmp_path):
    folder = Folder.open(tmp_path)
    DepthCache("model-1", folder).put(KEYS[0], GRAYS[0])
    assert DepthCache("model-1", folder).get(KEYS[0]) == GRAYS[0]
    assert DepthCache("model-1", folder).get(KEYS[1]) is None
    assert DepthCache("model-2", folder).get(KEYS[0]) is None


def colour() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "entry", [b"", b"no png", GRAYS[0][:-20], GRAYS[0][:60] + b"\0" + GRAYS[0][61:], colour()], ids=range(5)
)
def test_a_broken_entry_is_not_believed(tmp_path, entry, caplog):
    folder = Folder.open(tmp_path)
    DepthCache("model", folder).put(KEYS[0], GRAYS[0])
    (path,) = tmp_path.rglob("*.png")
    path.write_bytes(entry)
    assert DepthCache("model", folder).get(KEYS[0]) is None
    assert KEYS[0] in caplog.text
