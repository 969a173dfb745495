"""Estimated depth by the content of the picture, so that no picture is estimated twice."""

from __future__ import annotations

import io
import logging
from collections import OrderedDict

from PIL import Image

from sif_ray.storage import Folder

log = logging.getLogger(__name__)

MEMORY_BYTES = 256 * 2**20


class DepthCache:
    """Gray PNGs of depth (`encoding.gray_png`) by the SHA-256 of the encoded picture (hexadecimal).

    The memory holds the last ones used. A folder holds all, and is shared by workers and by runs: `model` keeps those
    of different weights apart. Entries of the folder are checked, and forgotten where they are broken.

    Example: `DepthCache(estimator.identity, Folder.open("s3://bucket/depth")).get(hashlib.sha256(image).hexdigest())`.
    """

    def __init__(self, model: str, folder: Folder | None = None, memory_bytes: int = MEMORY_BYTES) -> None:
        """`model`: `DepthEstimator.identity`. Without a folder there is the memory alone."""
        self._folder = folder.child(model) if folder else None
        self._memory_bytes = memory_bytes
        self._held_bytes = 0
        self._held: OrderedDict[str, bytes] = OrderedDict()

    def get(self, key: str) -> bytes | None:
        """The depth of a picture; None = not known."""
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        gray = self._read(key)
        if gray is not None:
            self._hold(key, gray)
        return gray

    def put(self, key: str, gray: bytes) -> None:
        """Keep the depth of a picture."""
        if self._folder:
            self._folder.child(_shelf(key)).write(f"{key}.png", gray)
        self._hold(key, gray)

    def _read(self, key: str) -> bytes | None:
        if not self._folder:
            return None
        try:
            gray = self._folder.child(_shelf(key)).read(f"{key}.png")
        except FileNotFoundError:
            return None
        if not _is_whole(gray):
            log.warning("depth cache: %s in %s is broken; it is made again", key, self._folder.url)
            return None
        return gray

    def _hold(self, key: str, gray: bytes) -> None:
        self._held_bytes += len(gray) - len(self._held.pop(key, b""))
        self._held[key] = gray
        while self._held_bytes > self._memory_bytes:
            self._held_bytes -= len(self._held.popitem(last=False)[1])


def _shelf(key: str) -> str:
    """The folder of an entry: a few hundred, as a million files in one folder are slow to handle."""
    return key[:2]


def _is_whole(gray: bytes) -> bool:
    """Whether the checksums of the PNG are right and it is one of depth."""
    try:
        with Image.open(io.BytesIO(gray), formats=("PNG",)) as image:
            is_gray = image.mode == "L"
            image.verify()
    except (OSError, SyntaxError, ValueError, EOFError):  # what Pillow raises for damaged files
        return False
    return is_gray
