"""Estimated depth by the content of the picture, so that no picture is estimated twice."""

from __future__ import annotations

from collections import OrderedDict

MEMORY_BYTES = 256 * 2**20


class DepthCache:
    """Gray PNGs of depth (`encoding.gray_png`) by a key of the picture, the least recently used ones forgotten."""

    def __init__(self, memory_bytes: int = MEMORY_BYTES) -> None:
        self._memory_bytes = memory_bytes
        self._held_bytes = 0
        self._held: OrderedDict[str, bytes] = OrderedDict()

    def get(self, key: str) -> bytes | None:
        """The depth of a picture; None = not known."""
        if key not in self._held:
            return None
        self._held.move_to_end(key)
        return self._held[key]

    def put(self, key: str, gray: bytes) -> None:
        """Keep the depth of a picture."""
        if key in self._held:
            return
        self._held[key] = gray
        self._held_bytes += len(gray)
        while self._held_bytes > self._memory_bytes:
            self._held_bytes -= len(self._held.popitem(last=False)[1])
