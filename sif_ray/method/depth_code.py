"""Relative depth and its pseudo-colour image.

One polarity everywhere: ``depth_rel`` is 0 at the nearest pixel of its image and 1 at the farthest; it has no unit.
The colour image is what the policy sees: Spectral_r over inverse depth, so near is red and far is blue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sif_ray.method.boxes import BoxError, as_rectangle
from sif_ray.method.profile import Profile, resolve

CONSTANT_DEPTH = 0.5
"""Depth of every pixel of an image without any relief: neither near nor far."""

GRAY_TOLERANCE = 2
"""An image whose channels differ by no more than this many levels anywhere is grayscale."""

_SPECTRAL_STOPS_RGB = (  # ColorBrewer "Spectral", 11 classes
    (158, 1, 66),
    (213, 62, 79),
    (244, 109, 67),
    (253, 174, 97),
    (254, 224, 139),
    (255, 255, 191),
    (230, 245, 152),
    (171, 221, 164),
    (102, 194, 165),
    (50, 136, 189),
    (94, 79, 162),
)


class DepthError(ValueError):
    """An array that is no depth map or no image of one."""


def _spectral_r() -> npt.NDArray[np.uint8]:
    stops_K3 = np.array(_SPECTRAL_STOPS_RGB[::-1], dtype=np.float64)
    index_N = np.arange(256) * (len(stops_K3) - 1) / 255
    channels = [np.interp(index_N, np.arange(len(stops_K3)), stops_K3[:, c]) for c in range(3)]
    # 1e-9: whole numbers stay what they are when interpolation ends a hair below them
    palette: npt.NDArray[np.uint8] = np.floor(np.stack(channels, axis=1) + 1e-9).astype(np.uint8)
    palette.setflags(write=False)
    return palette


PALETTE_RGB = _spectral_r()
"""Spectral_r, (256, 3) uint8: row 0 blue (far), row 255 dark red (near). The same bytes as matplotlib's."""


def from_disparity(disparity: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Relative depth from inverse depth (larger = nearer) by min-max over the image.

    Args:
        disparity: (H, W), any finite numbers, as Depth Anything returns them.

    Returns:
        (H, W) in [0, 1]; :data:`CONSTANT_DEPTH` everywhere if all values are equal.

    Raises:
        DepthError: for another shape, no pixels, or values that are not finite.
    """
    values_HW = _map(disparity, "disparity")
    low, high = float(values_HW.min()), float(values_HW.max())
    if low == high:
        return np.full(values_HW.shape, CONSTANT_DEPTH)
    # Scaled by a power of two, which is exact: high - low itself may overflow, and half of it may be 0.
    exponent = math.frexp(max(abs(low), abs(high)))[1] + 1
    values_HW, low, high = np.ldexp(values_HW, -exponent), math.ldexp(low, -exponent), math.ldexp(high, -exponent)
    depth_HW: npt.NDArray[np.float64] = (high - values_HW) / (high - low)
    return np.clip(depth_HW, 0.0, 1.0)


def encode(depth_rel: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Pseudo-colour image of a depth map, (H, W, 3) uint8 RGB: the palette's colours of :func:`palette_rows`.

    Store it without loss (PNG), else :func:`decode` can only guess.

    Raises:
        DepthError: as :func:`check_depth`.
    """
    return PALETTE_RGB.take(palette_rows(depth_rel), axis=0)


def palette_rows(depth_rel: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Depth in 256 steps, (H, W): row ``round((1 - depth) * 255)`` of the palette, so 255 is near and 0 is far.

    Raises:
        DepthError: as :func:`check_depth`.
    """
    rows_HW: npt.NDArray[np.uint8] = np.rint((1 - check_depth(depth_rel)) * 255).astype(np.uint8)
    return rows_HW


def decode(rgb: npt.ArrayLike, profile: str | Profile = "corrected") -> npt.NDArray[np.float64]:
    """Relative depth from a pseudo-colour or grayscale depth image.

    Colours of the palette give exactly ``1 - index / 255``; other colours that of the nearest palette colour. In a
    grayscale image (see :data:`GRAY_TOLERANCE`) white is near, as in Depth Anything's own; in the published profile
    white is far, the opposite of its colour images.

    Args:
        rgb: (H, W, 3) or, if gray, (H, W); uint8.

    Returns:
        (H, W) in [0, 1].

    Raises:
        DepthError: for another shape or type, or no pixels.
    """
    rules = resolve(profile)
    array = _array(rgb, "rgb")
    if array.dtype != np.uint8 or array.size == 0 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)):
        raise DepthError(
            f"rgb is {array.dtype} of shape {array.shape}; expected uint8 (height, width, 3) or (height, width)"
        )
    image = array.astype(np.uint8, copy=False)
    if image.ndim == 3 and _spread(image) > GRAY_TOLERANCE:
        return 1.0 - _palette_index(image) / 255.0
    gray_HW: npt.NDArray[np.float64] = (image if image.ndim == 2 else image.mean(axis=2)) / 255.0
    return gray_HW if rules.gray_depth_is_bright_far else 1.0 - gray_HW


def box_mean(depth_rel: npt.ArrayLike, box: Sequence[float]) -> float:
    """Arithmetic mean of the depth in ``box``; low edges rounded down and high edges up to whole pixels, clipped.

    A trace states it with 3 decimals; no rounding here.

    Args:
        depth_rel: (H, W), 0 = near.
        box: image frame; may leave the image.

    Raises:
        BoxError: if ``box`` is not four finite numbers or holds no pixel.
        DepthError: if ``depth_rel`` is no map of finite numbers.
    """
    return checked_box_mean(_map(depth_rel, "depth_rel"), box)


def check_depth(depth_rel: npt.ArrayLike, name: str = "depth_rel") -> npt.NDArray[np.float64]:
    """``depth_rel`` as a float array (H, W).

    Raises:
        DepthError: for another shape, no pixels, or a value that is not in [0, 1].
    """
    depth_HW = _map(depth_rel, name)
    low, high = float(depth_HW.min()), float(depth_HW.max())
    if low < 0 or high > 1:
        raise DepthError(f"{name} ranges from {low:g} to {high:g}; relative depth lies in [0, 1], 0 = near")
    return depth_HW


def checked_box_mean(depth_HW: npt.NDArray[np.float64 | np.uint8], box: Sequence[float]) -> float:
    """:func:`box_mean` for many boxes of one map, checked once by :func:`check_depth` or given in steps of 1/255, as
    uint8: these take an eighth of the memory, and their sums are exact.

    Raises:
        BoxError: as :func:`box_mean`.
    """
    x1, y1, x2, y2 = as_rectangle(box)
    height, width = depth_HW.shape
    left, top = max(math.floor(x1 * width), 0), max(math.floor(y1 * height), 0)
    right, bottom = max(math.ceil(x2 * width), 0), max(math.ceil(y2 * height), 0)
    pixels = depth_HW[top:bottom, left:right]
    if pixels.size == 0:
        raise BoxError(f"box {(x1, y1, x2, y2)} holds no pixel of the {width} x {height} depth map")
    if pixels.dtype == np.uint8:
        wide = np.uint32 if pixels.size < 1 << 24 else np.uint64  # half the time where no sum can overflow
        return int(pixels.sum(dtype=wide)) / (255 * pixels.size)
    return float(pixels.mean())


def _spread(image_HW3: npt.NDArray[np.uint8]) -> int:
    """Largest difference of two channels of one pixel, in levels."""
    return int((image_HW3.max(axis=2) - image_HW3.min(axis=2)).max())


def _palette_index(image_HW3: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    keys_HW = _keys(image_HW3)
    index_HW: npt.NDArray[np.uint8] = _INDEX_OF_SLOT[keys_HW % _NUM_SLOTS]
    unknown_HW = _PALETTE_KEYS[index_HW] != keys_HW
    if unknown_HW.any():
        from scipy.spatial import cKDTree  # takes long to import, and depth written by this module has no such colour

        keys_N, inverse_M = np.unique(keys_HW[unknown_HW], return_inverse=True)
        colours_N3 = np.stack([keys_N >> 16, keys_N >> 8 & 255, keys_N & 255], axis=1)
        index_HW[unknown_HW] = cKDTree(PALETTE_RGB.astype(np.float64)).query(colours_N3)[1][inverse_M]
    return index_HW


def _keys(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    """One number per colour."""
    wide = rgb.astype(np.uint32)
    keys: npt.NDArray[np.uint32] = wide @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    return keys


_PALETTE_KEYS = _keys(PALETTE_RGB)
_NUM_SLOTS = np.uint32(3967)  # the smallest divisor under which the remainders of all palette colours differ
_INDEX_OF_SLOT = np.zeros(_NUM_SLOTS, np.uint8)
_INDEX_OF_SLOT[_PALETTE_KEYS % _NUM_SLOTS] = np.arange(256)


def _map(values: npt.ArrayLike, name: str) -> npt.NDArray[np.float64]:
    array = _array(values, name)
    if array.ndim != 2 or array.size == 0:
        raise DepthError(f"{name} has shape {array.shape}; expected (height, width), both at least 1")
    if array.dtype.kind not in "fiu":
        raise DepthError(f"{name} holds {array.dtype}; expected numbers")
    floats: npt.NDArray[np.float64] = array.astype(np.float64, copy=False)
    if not np.isfinite(floats).all():
        raise DepthError(f"{name} holds NaN or infinity; fill such pixels before")
    return floats


def _array(values: npt.ArrayLike, name: str) -> npt.NDArray[np.generic]:
    try:
        return np.asarray(values)
    except ValueError as error:
        raise DepthError(f"{name} is no array: {error}") from error
