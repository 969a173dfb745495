"""Images that strangers send: bounded in bytes and pixels before anything is decoded."""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from dataclasses import dataclass

from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_ASPECT = 8
"""Longer over shorter side. Depth models enlarge the shorter side to a fixed length, so a narrow strip of few pixels
would become a huge image; Qwen-VL's processor refuses strips too."""

_ORIENTATION = 0x0112  # EXIF tag


class RequestRefused(ValueError):
    """The request is wrong: `status` is the HTTP status, the message names the field, the value and the way out."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Photo:
    """A decoded photograph. Example: `Photo(encoded=b"\\x89PNG...", rgb=<PIL.Image.Image mode=RGB size=112x112>)`."""

    encoded: bytes  # as it came; encoded anew where its EXIF orientation turned it
    rgb: Image.Image


def decode_base64(text: str) -> bytes:
    """The bytes of base64 text or of a base64 data URL. Raises `RequestRefused` for anything else."""
    if text.startswith(("http://", "https://", "file:")):
        raise RequestRefused(400, "image is an address; addresses are not fetched, send the image itself as base64")
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise RequestRefused(400, "image is a data URL without ';base64,'; encode the image as base64")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestRefused(400, f"image is not base64: {error}") from error


def read_photo(encoded: bytes, max_bytes: int, max_pixels: int) -> Photo:
    """The photograph, upright. Raises `RequestRefused` when it is too large, in another format, or broken."""
    if not encoded:
        raise RequestRefused(400, "image is empty")
    if len(encoded) > max_bytes:
        raise RequestRefused(413, f"image has {len(encoded)} bytes; at most {max_bytes} are accepted")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise RequestRefused(413, f"image has {width} x {height} pixels; at most {max_pixels} are accepted")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise RequestRefused(
                422,
                f"image has {width} x {height} pixels; the longer side may be at most {MAX_ASPECT} times the shorter",
            )
        turned = image.getexif().get(_ORIENTATION, 1) != 1
        rgb = ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError as error:
        raise RequestRefused(413, f"image is too large: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise RequestRefused(400, f"image is none of {', '.join(FORMATS)}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow raises for damaged files
        if isinstance(error, RequestRefused):
            raise
        raise RequestRefused(400, f"image cannot be decoded: {error}") from error
    return Photo(encode_png(rgb) if turned else encoded, rgb)


def encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
