"""Where a policy looks, drawn on its two pictures: the focus yellow on dimmed surroundings, evidence white."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont

from sif_ray.method.boxes import Box

SIDE_PX = 384  # longer side of each of the two pictures
GAP_PX = 6
TEXT_PX = 16

FOCUS, CASE, TRUTH, GREY = (255, 216, 61), (0, 0, 0), (255, 255, 255), (128, 128, 128)
PAPER, INK = (250, 250, 248), (26, 26, 30)
SHADE = 0.58  # brightness outside the focus


def draw_pair(photo: bytes, depth_image: bytes, focus: Sequence[Box], truth: Sequence[Box] = ()) -> Image.Image:
    """Photograph and depth map (encoded) side by side, with boxes in fractions of the image."""
    return _pair(_shown(photo), _shown(depth_image), focus, truth)


def draw_steps(photo: bytes, depth_image: bytes, steps: Iterable[tuple[Sequence[Box], str]], last: str) -> Image.Image:
    """A `draw_pair` for each step with its text below, one under the other, and below them `last`."""
    shown = _shown(photo), _shown(depth_image)
    rows: list[Image.Image] = []
    for number, (boxes, text) in enumerate(steps, 1):
        pair = _pair(*shown, boxes)
        rows += [pair, _caption(f"{number}  {text}".rstrip(), pair.width)]
    rows = rows or [_pair(*shown, ())]
    rows.append(_caption(last, rows[0].width))
    joined = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), PAPER)
    top = 0
    for row in rows:
        joined.paste(row, (0, top))
        top += row.height
    return joined


def jpeg(picture: Image.Image) -> bytes:
    """Encoded so that thin coloured lines stay sharp."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88, subsampling=0)
    return buffer.getvalue()


def _pair(photo: Image.Image, depth: Image.Image, focus: Sequence[Box], truth: Sequence[Box] = ()) -> Image.Image:
    pictures = [_draw(picture, truth, focus) for picture in (photo, depth)]
    height = max(picture.height for picture in pictures)
    joined = Image.new("RGB", (sum(picture.width for picture in pictures) + GAP_PX, height), GREY)
    joined.paste(pictures[0], (0, 0))
    joined.paste(pictures[1], (pictures[0].width + GAP_PX, 0))
    return joined


def _caption(text: str, width_px: int) -> Image.Image:
    font = ImageFont.load_default(TEXT_PX)
    lines = textwrap.wrap(text, max(8, int(width_px / (0.55 * TEXT_PX)))) or [""]
    caption = Image.new("RGB", (width_px, int((len(lines) + 1) * 1.3 * TEXT_PX)), PAPER)
    pen = ImageDraw.Draw(caption)
    pen.multiline_text((0.6 * TEXT_PX, 0.5 * TEXT_PX), "\n".join(lines), INK, font, spacing=0.3 * TEXT_PX)
    return caption


def _shown(encoded: bytes) -> Image.Image:
    """In the size in which it is drawn."""
    picture = Image.open(io.BytesIO(encoded))
    picture.thumbnail((SIDE_PX, SIDE_PX))  # a large JPEG is decoded at a smaller scale
    scale = SIDE_PX / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.convert("RGB").resize(size, Image.Resampling.NEAREST)


def _draw(shown: Image.Image, truth: Sequence[Box], focus: Sequence[Box]) -> Image.Image:
    picture, size = shown.copy(), shown.size
    if focus:
        inside = Image.new("1", size)
        for box in focus:
            ImageDraw.Draw(inside).rectangle(_pixels(box, size), fill=1)
        picture = Image.composite(picture, picture.point(lambda value: value * SHADE), inside)
    pen = ImageDraw.Draw(picture)
    for box in truth:
        _outline(pen, _pixels(box, size), TRUTH, 2)
    for box in focus:
        _outline(pen, _pixels(box, size), FOCUS, 3)
    return picture


def _outline(pen: ImageDraw.ImageDraw, corners: Sequence[int], colour: tuple[int, int, int], width: int) -> None:
    """A frame with a dark edge, so that it is seen on any ground."""
    x1, y1, x2, y2 = corners
    pen.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=CASE, width=width + 2)
    pen.rectangle((x1, y1, x2, y2), outline=colour, width=width)


def _pixels(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    width, height = size
    x1, y1, x2, y2 = box
    return round(x1 * (width - 1)), round(y1 * (height - 1)), round(x2 * (width - 1)), round(y2 * (height - 1))
