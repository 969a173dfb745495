"""Boxes: frames and their conversion, IoU, and the hierarchical IoU of two box sets (paper: r_bbox)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt

from sif_ray.method.profile import Profile, resolve

Box: TypeAlias = tuple[float, float, float, float]
"""``(x1, y1, x2, y2)``, fractions of image width and height, unless a name says pixels or padded square."""

FULL_IMAGE: Box = (0.0, 0.0, 1.0, 1.0)

COORDINATE_LIMIT = 1e6
"""Coordinates beyond this are refused rather than measured: their areas would lose all precision."""

_STRIP_CELLS = 1 << 22  # cells of the compressed grid held at once: about 32 MB
_FEW_BOXES = 24  # of both sets together: up to here plain Python measures a union faster than NumPy

_NUMBERS = (int, float, np.integer, np.floating)


class BoxError(ValueError):
    """Something given as a box, a set of boxes or an image size that cannot be one."""


def is_box(value: object) -> bool:
    """Whether ``value`` is four numbers with 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1."""
    rectangle = _rectangle(value)
    return rectangle is not None and _fits(rectangle)


def as_box(value: object, name: str = "box") -> Box:
    """``value`` as a tuple of floats.

    Raises:
        BoxError: unless :func:`is_box`.
    """
    rectangle = _rectangle(value)
    if rectangle is None or not _fits(rectangle):
        raise BoxError(f"{name} is {_shown(value)}; a box is 4 numbers with 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1")
    return rectangle


def as_boxes(values: object, name: str = "boxes") -> list[Box]:
    """``values`` as a list of boxes; an empty list stays empty.

    Raises:
        BoxError: for something that is not a sequence of boxes.
    """
    return [as_box(value, f"{name}[{index}]") for index, value in enumerate(_items(values, name))]


def hull(boxes: Sequence[Box]) -> Box:
    """The smallest box around all ``boxes``.

    Raises:
        BoxError: if there are none.
    """
    if len(boxes) == 0:
        raise BoxError("boxes is empty; a hull needs at least one box")
    x1, y1, x2, y2 = zip(*boxes, strict=True)
    return (min(x1), min(y1), max(x2), max(y2))


# ---------------------------------------------------------------------------------------------------- IoU


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two rectangles; 0 if either has no area.

    Coordinates may leave the image, as those a policy writes do.

    Raises:
        BoxError: unless both are four finite numbers of at most :data:`COORDINATE_LIMIT`.
    """
    return _iou(as_rectangle(a, "a"), as_rectangle(b, "b"))


def union_iou(P: Sequence[Sequence[float]], G: Sequence[Sequence[float]]) -> float:
    """IoU of the area covered by ``P`` with the area covered by ``G``, the "global" half of the hierarchical IoU.

    Exact, by coordinate compression. Rectangles without area are left out; then both empty gives 1, one empty 0.

    Raises:
        BoxError: as :func:`iou`.
    """
    return _union_iou(_as_rectangles(P, "P"), _as_rectangles(G, "G"))


def pair_iou(P: Sequence[Sequence[float]], G: Sequence[Sequence[float]]) -> float:
    """Sum of IoU over the best one-to-one matching of ``P`` and ``G``, divided by ``min(|P|, |G|)``.

    Surplus or missing boxes cost nothing here, only in :func:`union_iou`. Both empty gives 1, one empty 0.

    Raises:
        BoxError: as :func:`iou`.
    """
    return _pair_iou(_as_rectangles(P, "P"), _as_rectangles(G, "G"))


def hierarchical_iou(predicted: Sequence[Sequence[float]], target: Sequence[Sequence[float]]) -> float:
    """HIoU(P, G) = (union_iou(P, G) + pair_iou(P, G)) / 2, in [0, 1] (paper: hierarchical IoU of r_bbox).

    Args:
        predicted: boxes ``[x1, y1, x2, y2]``, P of them.
        target: boxes ``[x1, y1, x2, y2]``, G of them.

    Raises:
        BoxError: as :func:`iou`.
    """
    predicted_P4 = _as_rectangles(predicted, "predicted")
    target_G4 = _as_rectangles(target, "target")
    return (_union_iou(predicted_P4, target_G4) + _pair_iou(predicted_P4, target_G4)) / 2


def _iou(a: Box, b: Box) -> float:
    overlap = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    return overlap / (_area(a) + _area(b) - overlap) if overlap else 0.0


def _area(box: Box) -> float:
    width, height = box[2] - box[0], box[3] - box[1]
    return width * height if width > 0 and height > 0 else 0.0


def _pair_iou(P: list[Box], G: list[Box]) -> float:
    from scipy.optimize import linear_sum_assignment  # half a second, for the few importers of boxes that match any

    if not P or not G:
        return float(not P and not G)
    if len(P) == 1 or len(G) == 1:
        return max(_iou(p, g) for p in P for g in G)
    iou_PG = np.array([[_iou(p, g) for g in G] for p in P])
    rows, columns = linear_sum_assignment(iou_PG, maximize=True)
    return float(iou_PG[rows, columns].sum() / min(len(P), len(G)))


def _union_iou(P: list[Box], G: list[Box]) -> float:
    P, G = [box for box in P if _area(box) > 0], [box for box in G if _area(box) > 0]
    if not P or not G:
        return float(not P and not G)
    if len(P) == len(G) == 1:
        return _iou(P[0], G[0])
    both, either = (_few_areas if len(P) + len(G) <= _FEW_BOXES else _many_areas)(P, G)
    return both / either if either else 0.0


def _few_areas(P: list[Box], G: list[Box]) -> tuple[float, float]:
    """Areas of the intersection and of the union of what ``P`` and ``G`` cover: of the compressed grid a column is an
    integer, a cell a bit of it."""
    boxes = P + G
    xs = sorted({*[box[0] for box in boxes], *[box[2] for box in boxes]})
    ys = sorted({*[box[1] for box in boxes], *[box[3] for box in boxes]})
    bit = {y: 1 << index for index, y in enumerate(ys)}
    heights = {bit[below]: above - below for below, above in itertools.pairwise(ys)}
    bars = [(x1, x2, bit[y2] - bit[y1]) for x1, y1, x2, y2 in boxes]
    both = either = 0.0
    for left, right in itertools.pairwise(xs):
        in_P = in_G = 0
        for index, (x1, x2, cells) in enumerate(bars):
            if x1 <= left < x2:
                if index < len(P):
                    in_P |= cells
                else:
                    in_G |= cells
        for cell, height in heights.items():
            if (in_P | in_G) & cell:
                either += (right - left) * height
                if in_P & in_G & cell:
                    both += (right - left) * height
    return both, either


def _many_areas(P: list[Box], G: list[Box]) -> tuple[float, float]:
    """As :func:`_few_areas`, on a grid in NumPy, held a strip at a time."""
    box_N4 = np.array(P + G)
    xs_X, ys_Y = np.unique(box_N4[:, 0::2]), np.unique(box_N4[:, 1::2])
    rows_P4, rows_G4 = (
        np.stack([np.searchsorted(axis, boxes[:, k]) for k, axis in enumerate((xs_X, ys_Y, xs_X, ys_Y))], axis=1)
        for boxes in (box_N4[: len(P)], box_N4[len(P) :])
    )
    heights_Y = np.diff(ys_Y)
    both = either = 0.0
    strip = max(1, _STRIP_CELLS // len(ys_Y))
    for start in range(0, len(xs_X) - 1, strip):
        widths_S = np.diff(xs_X[start : start + strip + 1])
        in_P_SY = _covered(rows_P4, start, len(widths_S), len(heights_Y))
        in_G_SY = _covered(rows_G4, start, len(widths_S), len(heights_Y))
        both += float(widths_S @ ((in_P_SY & in_G_SY) @ heights_Y))
        either += float(widths_S @ ((in_P_SY | in_G_SY) @ heights_Y))
    return both, either


def _covered(corners_N4: npt.NDArray[np.int64], start: int, num_x: int, num_y: int) -> npt.NDArray[np.bool_]:
    """Which cells of the columns from ``start`` on some rectangle covers, (num_x, num_y)."""
    x1, y1, x2, y2 = corners_N4.T
    x1, x2 = np.clip(x1 - start, 0, num_x), np.clip(x2 - start, 0, num_x)
    steps = np.zeros((num_x + 1, num_y + 1), dtype=np.int64)
    for x, y, sign in ((x1, y1, 1), (x2, y2, 1), (x1, y2, -1), (x2, y1, -1)):
        np.add.at(steps, (x, y), sign)
    covered: npt.NDArray[np.bool_] = steps.cumsum(axis=0).cumsum(axis=1)[:num_x, :num_y] > 0
    return covered


# ------------------------------------------------------------------------------------------------- frames


def padded_square_to_image(box: Sequence[float], width: int, height: int) -> Box:
    """From fractions of the padded square to fractions of the image, clipped to it.

    Visual-CoT stores boxes of a ``width`` x ``height`` px image after adding ``(max - min) // 2`` px to the short axis
    and dividing by ``max(width, height)``.

    Raises:
        BoxError: if ``box`` lies in the padding altogether, is no rectangle, or the size is not positive.
    """
    x1, y1, x2, y2 = as_rectangle(box, "box")
    side, pad_x, pad_y = _padding(width, height)
    return pixels_to_norm((x1 * side - pad_x, y1 * side - pad_y, x2 * side - pad_x, y2 * side - pad_y), width, height)


def image_to_padded_square(box: Sequence[float], width: int, height: int) -> Box:
    """From fractions of the image to fractions of the padded square; inverse of :func:`padded_square_to_image`.

    Raises:
        BoxError: if ``box`` is no box in the image or the size is not positive.
    """
    x1, y1, x2, y2 = norm_to_pixels(box, width, height)
    side, pad_x, pad_y = _padding(width, height)
    return ((x1 + pad_x) / side, (y1 + pad_y) / side, (x2 + pad_x) / side, (y2 + pad_y) / side)


def ingest_padded_square(box: Sequence[float], width: int, height: int, profile: str | Profile = "corrected") -> Box:
    """A padded-square box of an annotation file as the profile reads it.

    Corrected: converted to the image frame. Published: the same four numbers taken for an image-frame box, which shifts
    it on every image that is not square.

    Raises:
        BoxError: as :func:`padded_square_to_image`.
    """
    if resolve(profile).converts_padded_square:
        return padded_square_to_image(box, width, height)
    return as_box(box)


def pixels_to_norm(box_px: Sequence[float], width: int, height: int) -> Box:
    """From pixels to fractions of the image; what leaves the image is clipped.

    Raises:
        BoxError: if nothing is left in the image, ``box_px`` is no rectangle, or the size is not positive.
    """
    _check_size(width, height)
    x1, y1, x2, y2 = as_rectangle(box_px, "box_px")
    box = (_clip(x1 / width), _clip(y1 / height), _clip(x2 / width), _clip(y2 / height))
    if not is_box(box):
        raise BoxError(f"box_px {_shown(box_px)} covers nothing of the {width} x {height} px image")
    return box


def norm_to_pixels(box: Sequence[float], width: int, height: int) -> Box:
    """From fractions of the image to pixels, not rounded.

    Raises:
        BoxError: if ``box`` is no box in the image or the size is not positive.
    """
    _check_size(width, height)
    x1, y1, x2, y2 = as_box(box)
    return (x1 * width, y1 * height, x2 * width, y2 * height)


def _padding(width: int, height: int) -> tuple[int, int, int]:
    """Side of the padded square and what is added left and on top, all in px."""
    _check_size(width, height)
    side = max(width, height)
    pad = (side - min(width, height)) // 2
    return side, pad if width < height else 0, pad if height < width else 0


def _check_size(width: int, height: int) -> None:
    for name, value in (("width", width), ("height", height)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 < value <= COORDINATE_LIMIT:
            raise BoxError(f"{name} is {_shown(value)}; the size of an image is a positive whole number of pixels")


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)


# ---------------------------------------------------------------------------------------------- reading


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite real number of at most :data:`COORDINATE_LIMIT`; booleans are not."""
    if type(value) is not float and (not isinstance(value, _NUMBERS) or isinstance(value, bool)):
        return False
    return bool(-COORDINATE_LIMIT <= value <= COORDINATE_LIMIT)  # NaN and infinity are not in between


def _rectangle(value: object) -> Box | None:
    if type(value) is tuple and len(value) == 4:  # as nearly all are: needs no other look
        x1, y1, x2, y2 = value
        if type(x1) is type(y1) is type(x2) is type(y2) is float:
            low, high = -COORDINATE_LIMIT, COORDINATE_LIMIT
            inside = low <= x1 <= high and low <= y1 <= high and low <= x2 <= high and low <= y2 <= high
            return value if inside else None
    if not _is_sequence(value) or len(value) != 4 or not all(map(is_number, value)):
        return None
    x1, y1, x2, y2 = map(float, value)
    return (x1, y1, x2, y2)


def _fits(rectangle: Box) -> bool:
    x1, y1, x2, y2 = rectangle
    return 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1


def as_rectangle(value: object, name: str = "box") -> Box:
    """``value`` as a tuple of floats; unlike a box it may leave the image or be inverted.

    Raises:
        BoxError: unless it is four finite numbers of at most :data:`COORDINATE_LIMIT`.
    """
    rectangle = _rectangle(value)
    if rectangle is None:
        raise BoxError(f"{name} is {_shown(value)}; expected 4 finite numbers [x1, y1, x2, y2]")
    return rectangle


def _as_rectangles(values: object, name: str) -> list[Box]:
    return [
        _rectangle(value) or as_rectangle(value, f"{name}[{index}]")  # which says what is wrong with it
        for index, value in enumerate(_items(values, name))
    ]


def _is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    if isinstance(value, (list, tuple)):  # asking for Sequence takes far longer
        return True
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _items(values: object, name: str) -> Sequence[object]:
    if not _is_sequence(values):
        raise BoxError(f"{name} is {_shown(values)}; expected a list of boxes [x1, y1, x2, y2]")
    return values


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."
