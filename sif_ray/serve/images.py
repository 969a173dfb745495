"""Images that strangers send: bounded in bytes and pixels before anything is decoded."""

from __future__ import annotations

import base64
import binascii

from sif_ray.datagen import pictures
from sif_ray.datagen.pictures import Limits, Photo, PhotoError
from sif_ray.serve.refusal import RequestRefused

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_ASPECT = 8.0
"""Longer over shorter side. Depth models enlarge the shorter side to a fixed length, so a narrow strip of few pixels
would become a huge image; Qwen-VL's processor refuses strips too."""

MAX_SCANS = 100
"""Of a JPEG; encoders write about ten. The decoder goes over all pixels for each, and 60 bytes make one: a megabyte of
them would keep a thread busy for a quarter of an hour."""

_SCAN = b"\xff\xda"  # the marker before each; in pixel data, 0xff is never followed by it
_STATUS = {"image_unreadable": 400, "image_too_large": 413, "image_too_thin": 422}


def decode_base64(text: str) -> bytes:
    """The bytes of base64 text or of a base64 data URL. Raises `RequestRefused` for anything else."""
    if text[:5].lower() == "data:":
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
    if encoded.startswith(b"\xff\xd8") and encoded.count(_SCAN) > MAX_SCANS:
        raise RequestRefused(413, f"image has {encoded.count(_SCAN)} scans; at most {MAX_SCANS} are decoded")
    try:
        return pictures.read(encoded, Limits(FORMATS, min_side_px=1, max_aspect=MAX_ASPECT, max_pixels=max_pixels))
    except PhotoError as error:
        raise RequestRefused(_STATUS[error.reason], str(error)) from error
