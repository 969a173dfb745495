"""Photographs as they come, checked before they are decoded and made to look the same to every later reader."""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

_ORIENTATION = 0x0112  # EXIF tag
_SIDES_SWAPPED = (5, 6, 7, 8)  # its values that turn the picture by a quarter
_COMMON_FORMATS = ("JPEG", "MPO", "PNG", "WEBP")  # MPO: a JPEG with further pictures behind the first
_COMMON_MODES = ("1", "L", "P", "RGB")
_JPEG_QUALITY = 95

PILLOW_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, AssertionError, struct.error
)  # fmt: skip
"""What Pillow raises for damaged files."""


class PhotoError(ValueError):
    """A photograph that cannot be used; `reason` is a stable word that is counted."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(f"{reason}: {detail}")


@dataclass(frozen=True)
class Limits:
    """What is read at all. All but the format is known from the header, so a refused picture is never decoded."""

    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # names of Pillow
    min_side_px: int = 16  # less than a patch or two: nothing can be seen in it
    max_aspect: float = 200.0  # longer over shorter side; the Qwen2.5-VL image processor refuses more
    max_pixels: int = 64_000_000


@dataclass(frozen=True)
class Photo:
    """A decoded photograph: `rgb` is what any reader makes of `encoded`.

    Example: `Photo(encoded=b"\\x89PNG...", rgb=<PIL.Image.Image mode=RGB size=112x112>)`.
    """

    encoded: bytes  # as it came, or encoded anew where readers would differ
    rgb: Image.Image


def decode(image: bytes) -> Image.Image:
    """The photograph as RGB, upright. Raises `PhotoError`, as `read`."""
    return read(image).rgb


def read(encoded: bytes, limits: Limits = Limits(), stated_size: tuple[int, int] | None = None) -> Photo:
    """The photograph as 8-bit RGB, decoded whole.

    A picture that readers would show differently is encoded anew: one with an EXIF orientation, 16 bits per channel,
    CMYK or transparency, an animation, and any format but JPEG, PNG and WebP. A JPEG becomes one of quality 95, all
    else a PNG. 16 bits are scaled to 8, transparency is laid over white, an animation is its first frame.

    Tools for annotation differ in whether they apply an EXIF orientation, and boxes mean the pixels that the tool saw.
    So `stated_size` (width, height in px, as the annotation has it) decides: the pixels as stored if they have this
    size, else the upright picture if that has it. Without a stated size the picture is upright.

    Raises:
        PhotoError: `image_unreadable`, `image_too_small`, `image_too_thin`, `image_too_large` (for `limits`), or
            `image_size_mismatch`.
    """
    with _photo_errors(limits), Image.open(io.BytesIO(encoded), formats=limits.formats) as image:
        _check_size(image.size, limits)
        alike = _reads_alike(image)
        orientation = image.getexif().get(_ORIENTATION, 1)
        if _is_upright(image.size, orientation, stated_size):
            rgb = _to_rgb(image)
        else:
            rgb = _to_rgb(ImageOps.exif_transpose(image))
        if alike and orientation == 1:
            return Photo(encoded, rgb)
        return _encoded_anew(rgb, is_jpeg=image.format in ("JPEG", "MPO"))


def size_px(file: BinaryIO, limits: Limits = Limits()) -> tuple[int, int]:
    """Width and height of the upright picture in a file, of which only the header is read. Raises as `read`."""
    with _photo_errors(limits), Image.open(file, formats=limits.formats) as image:
        _check_size(image.size, limits)
        return _upright_size(image.size, image.getexif().get(_ORIENTATION, 1))


@contextlib.contextmanager
def _photo_errors(limits: Limits) -> Iterator[None]:
    """Inside, what Pillow raises becomes a `PhotoError`."""
    try:
        yield
    except PhotoError:
        raise
    except Image.DecompressionBombError as error:
        raise PhotoError("image_too_large", str(error)) from error
    except UnidentifiedImageError as error:
        raise PhotoError("image_unreadable", f"none of {', '.join(limits.formats)}") from error
    except PILLOW_ERRORS as error:
        raise PhotoError("image_unreadable", f"cannot be decoded: {str(error) or 'broken'}") from error


def _check_size(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    shown = f"{width} x {height} pixels"
    if width * height > limits.max_pixels:
        raise PhotoError("image_too_large", f"{shown}; at most {limits.max_pixels} are read")
    if min(width, height) < limits.min_side_px:
        raise PhotoError("image_too_small", f"{shown}; both sides need {limits.min_side_px}")
    if max(width, height) > limits.max_aspect * min(width, height):
        most = f"the longer side may be at most {limits.max_aspect:g} times the shorter"
        raise PhotoError("image_too_thin", f"{shown}; {most}")


def _is_upright(size: tuple[int, int], orientation: int, stated_size: tuple[int, int] | None) -> bool:
    """Whether the stored pixels are the ones to take, rather than those that the EXIF orientation makes of them."""
    if stated_size is None:
        return orientation == 1
    if stated_size not in (size, _upright_size(size, orientation)):
        raise PhotoError("image_size_mismatch", f"{size} px where the annotation says {stated_size}")
    return stated_size == size


def _upright_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return (size[1], size[0]) if orientation in _SIDES_SWAPPED else size


def _reads_alike(image: Image.Image) -> bool:
    """Whether every decoder makes the same picture of the file, its EXIF orientation aside."""
    is_animated = image.format != "MPO" and getattr(image, "n_frames", 1) > 1
    is_deep = ";16" in str(getattr(image, "tile", ""))  # in Pillow's name for the samples of the file
    common = image.format in _COMMON_FORMATS and image.mode in _COMMON_MODES
    return common and not (is_animated or is_deep or image.has_transparency_data)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise PhotoError("image_unreadable", f"mode {image.mode}: 32-bit numbers without a known range")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _encoded_anew(rgb: Image.Image, is_jpeg: bool) -> Photo:
    buffer = io.BytesIO()
    if not is_jpeg:
        Image.fromarray(np.asarray(rgb)).save(buffer, "PNG")  # from the pixels alone, so that no metadata follow
        return Photo(buffer.getvalue(), rgb)
    Image.fromarray(np.asarray(rgb)).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    with Image.open(buffer) as image:
        return Photo(buffer.getvalue(), image.convert("RGB"))
