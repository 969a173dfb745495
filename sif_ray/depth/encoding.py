"""The depth image that the policy sees."""

from __future__ import annotations

import io

import numpy.typing as npt
from PIL import Image

from sif_ray.method.depth_code import encode


def depth_png(depth_rel: npt.ArrayLike) -> bytes:
    """The pseudo-colour PNG of depth_rel (H, W), from which `method.depth_code.decode` reads it back to 1/255."""
    buffer = io.BytesIO()
    Image.fromarray(encode(depth_rel)).save(buffer, "PNG")
    return buffer.getvalue()
