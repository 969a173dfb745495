"""Pictures as the world has them: each is read as what it shows, or refused with a reason before it costs memory."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sif_ray.datagen.pictures import Limits, Photo, PhotoError, decode, read

WIDTH, HEIGHT = 60, 40
HALVES = np.zeros((HEIGHT, WIDTH, 3), np.uint8)  # left red, right blue, with a green corner at the top left
HALVES[:, :30], HALVES[:, 30:], HALVES[:8, :8] = (200, 30, 30), (30, 30, 200), (30, 200, 30)


def encoded(pixels: np.ndarray = HALVES, form: str = "PNG", mode: str | None = None, **options) -> bytes:
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colour_type: int, data: bytes, *between: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(between) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def turned(orientation: int, form: str = "JPEG", pixels: np.ndarray = HALVES) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(pixels, form, exif=exif, **({"quality": 95} if form == "JPEG" else {}))


def assert_stands_for_itself(photo: Photo) -> None:
    """Any reader sees `rgb` in `encoded`, whether or not it knows about EXIF."""
    with Image.open(io.BytesIO(photo.encoded)) as image:
        assert image.getexif().get(0x0112, 1) == 1
        assert image.mode in ("RGB", "L", "P", "1")
        assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(photo.rgb))


# --- read as what they show ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_plain_picture_stays_as_it_came(form, mode):
    image = encoded(form=form, mode=mode)
    photo = read(image, stated_size=(WIDTH, HEIGHT))
    assert photo.encoded is image
    assert_stands_for_itself(photo)


def test_a_palette_without_transparency_stays_as_it_came():
    photo = read(encoded(mode="P"))
    assert_stands_for_itself(photo)
    assert np.abs(np.asarray(photo.rgb, int) - HALVES).max() < 60


@pytest.mark.parametrize("form", ["BMP", "TIFF", "GIF"])
def test_formats_that_not_every_reader_knows_become_png(form):
    photo = read(encoded(form=form))
    assert photo.encoded.startswith(b"\x89PNG")
    assert_stands_for_itself(photo)
    assert np.abs(np.asarray(photo.rgb, int) - HALVES).max() < 3


def test_cmyk_becomes_a_jpeg_of_the_same_colours():
    photo = read(encoded(form="JPEG", mode="CMYK", quality=95))
    with Image.open(io.BytesIO(photo.encoded)) as image:
        assert (image.format, image.mode) == ("JPEG", "RGB")
    assert_stands_for_itself(photo)
    assert np.abs(np.asarray(photo.rgb, int)[20, [10, 50]] - HALVES[20, [10, 50]]).max() < 12


RAMP16 = np.tile(np.arange(0, 65536, 1040, dtype=np.uint16), (20, 1))  # 64 levels


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bits_are_scaled_and_not_clipped(form):
    photo = read(encoded(RAMP16, form))
    assert_stands_for_itself(photo)
    np.testing.assert_array_equal(np.asarray(photo.rgb)[0, :, 0], np.rint(RAMP16[0] / 257))


def test_big_endian_16_bit_tiff_is_scaled():
    photo = read(encoded(RAMP16.astype(">u2"), "TIFF"))
    np.testing.assert_array_equal(np.asarray(photo.rgb)[0, :, 0], np.rint(RAMP16[0] / 257))


def test_16_bits_in_three_channels_keep_their_high_byte():
    pixels = np.repeat(RAMP16[..., None], 3, axis=2).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    photo = read(png(RAMP16.shape[1], RAMP16.shape[0], 16, 2, rows))
    assert_stands_for_itself(photo)
    assert photo.encoded[24] == 8  # bits of a channel, in the header
    assert np.abs(np.asarray(photo.rgb, int)[0, :, 0] - RAMP16[0] / 257).max() <= 1


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_what_is_transparent_is_white(form):
    alpha = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
    alpha[:, 30:] = 0
    photo = read(
        encoded(np.concatenate([HALVES, alpha], axis=2), form, **({"lossless": True} if form == "WEBP" else {}))
    )
    assert_stands_for_itself(photo)
    assert np.array_equal(np.asarray(photo.rgb)[:, :30], HALVES[:, :30])
    assert (np.asarray(photo.rgb)[:, 30:] == 255).all()


def test_a_transparent_colour_of_a_palette_is_white():
    image = Image.fromarray((HALVES[..., 2] > 100).astype(np.uint8))
    image.putpalette([200, 30, 30, 30, 30, 200])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=1)
    photo = read(buffer.getvalue())
    assert_stands_for_itself(photo)
    assert np.asarray(photo.rgb)[20, [10, 50]].tolist() == [[200, 30, 30], [255, 255, 255]]


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_its_first_frame(form):
    second = Image.new("RGB", (WIDTH, HEIGHT), "yellow")
    buffer = io.BytesIO()
    options = {"lossless": True} if form == "WEBP" else {}
    Image.fromarray(HALVES).save(buffer, form, save_all=True, append_images=[second], duration=100, **options)
    photo = read(buffer.getvalue())
    assert_stands_for_itself(photo)
    with Image.open(io.BytesIO(photo.encoded)) as image:
        assert getattr(image, "n_frames", 1) == 1
    assert np.abs(np.asarray(photo.rgb, int) - HALVES).max() < 3


# --- orientation -----------------------------------------------------------------------------------------------------

UPRIGHT = {  # by EXIF orientation, what the stored pixels are turned into (EXIF 2.3, table 6)
    2: HALVES[:, ::-1],
    3: HALVES[::-1, ::-1],
    4: HALVES[::-1],
    5: HALVES.transpose(1, 0, 2),
    6: np.rot90(HALVES, -1),
    7: HALVES[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(HALVES),
}


def nearly(photo: Photo, pixels: np.ndarray) -> bool:
    shown = np.asarray(photo.rgb, int)
    return shown.shape == pixels.shape and np.abs(shown - pixels).mean() < 6


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_turned_picture_is_upright_unless_the_annotation_has_the_size_of_its_stored_pixels(orientation, form):
    image = turned(orientation, form)
    upright, stored = read(image), read(image, stated_size=(WIDTH, HEIGHT))
    assert nearly(upright, UPRIGHT[orientation])
    assert nearly(stored, HALVES)
    if orientation >= 5:
        assert nearly(read(image, stated_size=(HEIGHT, WIDTH)), UPRIGHT[orientation])
    for photo in (upright, stored):
        assert_stands_for_itself(photo)
        with Image.open(io.BytesIO(photo.encoded)) as kept:
            assert kept.format == ("JPEG" if form == "JPEG" else "PNG")


@pytest.mark.parametrize("image", [encoded(), turned(6)])
def test_a_size_that_neither_the_stored_nor_the_upright_picture_has_is_a_mismatch(image):
    with pytest.raises(PhotoError, match=r"\(60, 40\) px where the annotation says \(60, 41\)") as caught:
        read(image, stated_size=(60, 41))
    assert caught.value.reason == "image_size_mismatch"


# --- refused ---------------------------------------------------------------------------------------------------------

JPEG = encoded(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8), "JPEG")
REFUSED = {
    "no bytes": (b"", "image_unreadable"),
    "text": (b"this is no image", "image_unreadable"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="60" height="40"/>', "image_unreadable"),
    "postscript, which Pillow hands to another program": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 40\n%%EndComments\n",
        "image_unreadable",
    ),
    "jpeg cut in the middle": (JPEG[: len(JPEG) // 2], "image_unreadable"),
    "png cut in the middle": (encoded()[:90], "image_unreadable"),
    "png without data": (b"\x89PNG\r\n\x1a\n" + bytes(50), "image_unreadable"),
    "32-bit numbers": (encoded(np.ones((40, 60), np.float32), "TIFF"), "image_unreadable"),
    "1 x 1": (encoded(HALVES[:1, :1]), "image_too_small"),
    "strip": (encoded(np.zeros((16, 4000), np.uint8)), "image_too_thin"),
    "30,000 x 30,000": (png(30_000, 30_000, 8, 2, b""), "image_too_large"),
    "9,000 x 9,000, below the alarm of Pillow": (png(9_000, 9_000, 8, 2, b""), "image_too_large"),
    "text that unpacks to 100 MB": (
        png(60, 40, 8, 0, bytes(41 * 60), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000), 9))),
        "image_unreadable",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_says_why(name):
    image, reason = REFUSED[name]
    with pytest.raises(PhotoError) as caught:
        decode(image)
    assert caught.value.reason == reason


def test_a_refused_giant_costs_no_memory():
    """30,000 x 30,000 real pixels in 2.6 MB: decoded they would take 2.7 GB."""
    program = """
import io, resource, struct, sys, zlib
from sif_ray.datagen.pictures import PhotoError, decode
packer, parts = zlib.compressobj(9), []
for _ in range(30_000):
    parts.append(packer.compress(bytes(90_001)))
data = b"".join([*parts, packer.flush()])
def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
image = b"\\x89PNG\\r\\n\\x1a\\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")
before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode(image)
except PhotoError as error:
    print(error.reason, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib)
"""
    reason, kib = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert reason == "image_too_large"
    assert int(kib) < 20_000


SEEDS = [
    encoded(form="PNG"),
    JPEG,
    encoded(form="WEBP"),
    encoded(form="GIF"),
    encoded(form="BMP"),
    encoded(form="TIFF"),
    encoded(RAMP16, "TIFF"),
    turned(6),
    turned(6, "PNG"),
    turned(6, "WEBP"),
    turned(6, "TIFF"),
]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_pictures_are_read_or_refused_and_never_anything_else(data):
    image = bytearray(data.draw(st.sampled_from(SEEDS)))
    for place in data.draw(st.lists(st.integers(0, len(image) - 1), max_size=8)):
        image[place] = data.draw(st.integers(0, 255))
    image = image[: data.draw(st.integers(0, len(image)))] if data.draw(st.booleans()) else image
    try:
        photo = read(bytes(image))
    except PhotoError as error:
        assert error.reason.startswith("image_")
    else:
        assert photo.rgb.mode == "RGB"


def test_limits_are_the_callers():
    with pytest.raises(PhotoError, match="60 x 40 pixels; at most 2399"):
        read(encoded(), Limits(max_pixels=2399))
    with pytest.raises(PhotoError, match=r"the longer side may be at most 1\.4 times the shorter"):
        read(encoded(), Limits(max_aspect=1.4))
    with pytest.raises(PhotoError, match="image_unreadable"):
        read(encoded(form="GIF"), Limits(formats=("PNG",)))
