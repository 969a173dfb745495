"""Depth that comes with a picture instead of being estimated."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.ndimage import distance_transform_edt


def fill_holes(depth_m: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """(H, W) in metres with every NaN replaced by the measured pixel nearest to it in the image."""
    nearest = distance_transform_edt(np.isnan(depth_m), return_distances=False, return_indices=True)
    filled: npt.NDArray[np.float64] = depth_m.astype(np.float64)[tuple(nearest)]
    return filled
