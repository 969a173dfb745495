"""Depth as PNGs of 8 bits: in gray, and in the pseudo-colours that the policy sees."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from sif_ray.method.depth_code import PALETTE_RGB, palette_rows

_COMPRESS_LEVEL = 1  # zlib's default of 6 makes depth a fifth smaller and takes five times as long


def depth_png(depth_rel: npt.ArrayLike) -> bytes:
    """The pseudo-colour PNG of depth_rel (H, W), from whose RGB pixels `method.depth_code.decode` reads it to 1/255.

    It is an indexed PNG: a third of the data of one with three channels. Raises `DepthError` for no depth map.
    """
    image = Image.fromarray(palette_rows(depth_rel))
    image.putpalette(PALETTE_RGB.tobytes())
    return _png(image)


def gray_png(depth_rel: npt.ArrayLike) -> bytes:
    """The grayscale PNG of depth_rel (H, W), level 0 = near and 255 = far. Raises `DepthError` for no depth map."""
    return _png(Image.fromarray(255 - palette_rows(depth_rel)))


def read_gray(gray: bytes) -> npt.NDArray[np.float64]:
    """depth_rel (H, W) of what `gray_png` has made; both PNGs of it are the same again."""
    with Image.open(io.BytesIO(gray), formats=("PNG",)) as image:
        return np.asarray(image) / 255.0


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=_COMPRESS_LEVEL)
    return buffer.getvalue()
