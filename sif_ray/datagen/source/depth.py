"""Depth that comes with a picture instead of being estimated."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.ndimage import distance_transform_edt

from sif_ray.datagen.pictures import PILLOW_ERRORS, PhotoError
from sif_ray.depth.encoding import depth_png
from sif_ray.method.depth_code import decode, from_disparity
from sif_ray.method.profile import PUBLISHED

_FORMATS = ("PNG", "TIFF", "BMP")  # without loss


def colour_depth(encoded: bytes) -> bytes:
    """The pseudo-colour PNG of a depth picture, in which 0 is near in any case:

    - 16 or 32 bits per pixel: distances in any unit; 0, what is negative and what is not finite was not measured, and
      takes the nearest pixel's. Relative depth follows from their inverse, as in estimated depth.
    - 8 bits, gray: relative depth, black is near and white is far.
    - 8 bits, colours of Spectral_r: relative depth as the policy sees it, red is near.

    Raises `PhotoError` (`depth_unreadable`) for anything else.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            if image.mode.startswith(("I", "F")):
                distance_HW = np.asarray(image).astype(np.float64)
                measured_HW = np.isfinite(distance_HW) & (distance_HW > 0)
                if not measured_HW.any():
                    raise PhotoError("depth_unreadable", "no pixel was measured")
                return depth_png(from_disparity(1 / fill_holes(np.where(measured_HW, distance_HW, np.nan))))
            # of a gray picture black is near here; the published reading is the one of that polarity
            return depth_png(decode(np.asarray(image.convert("RGB")), PUBLISHED))
    except PhotoError:
        raise
    except (*PILLOW_ERRORS, Image.DecompressionBombError) as error:
        raise PhotoError("depth_unreadable", str(error)) from error


def fill_holes(distance: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """(H, W) distances with every NaN replaced by the measured pixel nearest to it in the image."""
    nearest = distance_transform_edt(np.isnan(distance), return_distances=False, return_indices=True)
    filled: npt.NDArray[np.float64] = distance.astype(np.float64)[tuple(nearest)]
    return filled
