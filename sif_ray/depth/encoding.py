"""Depth as PNGs of 8 bits: in gray, and in the pseudo-colours that the policy sees.

The files are written here, not by Pillow: depth is smooth, so that the difference to the row above and zlib's fastest
level suit it, in half the time and in no more bytes.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import numpy.typing as npt
from PIL import Image

from sif_ray.method.depth_code import PALETTE_RGB, palette_rows

_GRAY, _INDEXED = 0, 3  # colour types (PNG specification, 11.2.2)
_SIGNATURE = b"\x89PNG\r\n\x1a\n"  # the header is in bytes 16 to 29, its colour type the tenth of them
_UP = 2  # filter: differences to the row above (9.2)


def depth_png(depth_rel: npt.ArrayLike) -> bytes:
    """The pseudo-colour PNG of depth_rel (H, W), from whose RGB pixels `method.depth_code.decode` reads it to 1/255.

    It is an indexed PNG: a third of the data of one with three channels. Raises `DepthError` for no depth map.
    """
    return coloured(gray_png(depth_rel))


def gray_png(depth_rel: npt.ArrayLike) -> bytes:
    """The grayscale PNG of depth_rel (H, W), level 0 = near and 255 = far. Raises `DepthError` for no depth map."""
    levels_HW = 255 - palette_rows(depth_rel)
    height, width = levels_HW.shape
    lines = np.empty((height, 1 + width), np.uint8)  # each begins with the number of its filter
    lines[:, 0] = _UP
    lines[0, 1:] = levels_HW[0]
    np.subtract(levels_HW[1:], levels_HW[:-1], out=lines[1:, 1:])  # modulo 256, as the filter is defined
    header = struct.pack(">IIBBBBB", width, height, 8, _GRAY, 0, 0, 0)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(lines, level=1)) + _chunk(b"IEND", b"")


def coloured(gray: bytes) -> bytes:
    """The `depth_png` of the depth of a `gray_png`: its samples as they are, under a palette."""
    header = gray[16:25] + bytes([_INDEXED]) + gray[26:29]
    return _SIGNATURE + _chunk(b"IHDR", header) + _PALETTE_OF_GRAY + gray[33:]


def read_gray(gray: bytes) -> npt.NDArray[np.float64]:
    """depth_rel (H, W) of what `gray_png` has made; both PNGs of it are the same again."""
    with Image.open(io.BytesIO(gray), formats=("PNG",)) as image:
        return np.asarray(image) / 255.0


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


_PALETTE_OF_GRAY = _chunk(b"PLTE", PALETTE_RGB[::-1].tobytes())  # row 0 = near, as level 0 is
