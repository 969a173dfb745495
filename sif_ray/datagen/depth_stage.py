"""The depth stage: pictures are opened and checked, boxes move into the image frame, and every picture gets depth."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from PIL import Image

from sif_ray.config import GenerateConfig
from sif_ray.datagen import pictures
from sif_ray.datagen.drafts import Draft
from sif_ray.datagen.pictures import PhotoError
from sif_ray.depth.encoding import coloured, gray_png
from sif_ray.method.boxes import (
    Box,
    BoxError,
    as_box,
    as_rectangle,
    image_to_padded_square,
    norm_to_pixels,
    padded_square_to_image,
    pixels_to_norm,
)
from sif_ray.method.depth_code import decode
from sif_ray.method.profile import resolve

log = logging.getLogger(__name__)

SLACK_PX = 1.0  # boxes that leave the image by no more are rounded ones, and are clipped
ROUNDING = 1e-3  # the same for fractions with three decimals, which is more than a pixel on large images


class AddDepth:
    """Completes the drafts of a shard by width, height, boxes in the image frame, and depth.

    Refused are pictures that cannot be used (reasons of `pictures.read`), rows without boxes (`boxes_missing`) or with
    wrong ones (`boxes_invalid`), and given depth that is broken (`depth_unreadable`) or of another size than its
    picture (`depth_size_mismatch`). Drafts that are refused already stay as they are.
    """

    def __init__(self, config: GenerateConfig) -> None:
        from sif_ray.depth.known import KnownDepth  # loads torch, only where the model runs

        self._depth = KnownDepth(config)
        self._profile = config.profile

    def __call__(self, drafts: list[Draft]) -> list[Draft]:
        """The drafts in order. Equal pictures are estimated once, and no picture stays decoded."""
        opened: list[Draft] = []
        grays = self._depth.grays(self._without_depth(drafts, opened))
        return [self._with_estimate(draft, grays) if _lacks_depth(draft) else draft for draft in opened]

    def _without_depth(self, drafts: list[Draft], opened: list[Draft]) -> Iterator[tuple[str, Image.Image]]:
        """The pictures whose depth is to be found, one by one; the drafts go to `opened` as they are opened."""
        for draft in drafts:
            rgb = None
            if not draft.reasons:
                draft, rgb = open_picture(draft, self._profile)
            opened.append(draft)
            if rgb is not None and not draft.depth_gray:
                yield _picture_key(draft), rgb

    def _with_estimate(self, draft: Draft, grays: dict[str, bytes]) -> Draft:
        gray = grays[_picture_key(draft)]
        source = f"estimated:{self._depth.name}"
        sample = replace(draft.sample, depth_image=coloured(gray), depth_source=source)
        return replace(draft, sample=sample, depth_gray=gray)


def _lacks_depth(draft: Draft) -> bool:
    return not draft.reasons and not draft.depth_gray


def _picture_key(draft: Draft) -> str:
    return hashlib.sha256(draft.sample.image).hexdigest()


def open_picture(draft: Draft, profile: str) -> tuple[Draft, Image.Image | None]:
    """A draft with its size in px, its boxes in the image frame and the depth that came with it; and its picture,
    None for a draft that had to be refused."""
    sample = draft.sample
    try:
        photo = pictures.read(sample.image, stated_size=(sample.width, sample.height) if sample.width else None)
    except PhotoError as error:
        log.info("%s: %s", sample.sample_id, error)
        return draft.refused(error.reason), None
    width, height = photo.rgb.size
    sample = replace(sample, image=photo.encoded, width=width, height=height)
    draft = replace(draft, sample=sample)
    if not sample.boxes:
        return draft.refused("boxes_missing"), None
    try:
        boxes = tuple(to_image_frame(box, sample.source_frame, width, height, profile) for box in sample.boxes)
    except BoxError as error:
        log.info("%s: %s", sample.sample_id, error)
        return draft.refused("boxes_invalid"), None
    draft = replace(draft, sample=replace(sample, boxes=boxes))
    if sample.depth_image:
        draft = with_given_depth(draft, profile)
    return draft, photo.rgb


def with_given_depth(draft: Draft, profile: str) -> Draft:
    """A draft with the gray depth of its depth image."""
    sample = draft.sample
    try:
        with Image.open(io.BytesIO(sample.depth_image), formats=("PNG",)) as image:
            if image.size != (sample.width, sample.height):
                return draft.refused("depth_size_mismatch")
            return replace(draft, depth_gray=gray_png(decode(np.asarray(image.convert("RGB")), profile)))
    except pictures.PILLOW_ERRORS as error:
        log.info("%s: depth image: %s", sample.sample_id, error)
        return draft.refused("depth_unreadable")


def to_image_frame(box: tuple[float, ...], frame: str, width: int, height: int, profile: str) -> Box:
    """A box of a source as fractions of the image of `width` x `height` px.

    `frame` is what its numbers are (`annotations.Frame`). The published profile reads those of the padded square as if
    they were fractions of the image. What leaves the image by rounding (`SLACK_PX`, `ROUNDING`) is clipped.

    Raises:
        BoxError: for anything but four finite numbers, a box that is inverted or empty, or one outside the image.
    """
    given = as_rectangle(box)
    if frame == "pixels":
        units_px = (1, 1)
        found = pixels_to_norm(given, width, height)
        back = norm_to_pixels(found, width, height)
    elif frame == "padded_square" and resolve(profile).converts_padded_square:
        units_px = (max(width, height),) * 2
        found = padded_square_to_image(given, width, height)
        back = image_to_padded_square(found, width, height)
    else:
        units_px = (width, height)
        x1, y1, x2, y2 = (min(max(number, 0.0), 1.0) for number in given)
        found = back = as_box((x1, y1, x2, y2))
    for number, kept, unit_px in zip(given, back, units_px * 2, strict=True):
        if abs(number - kept) > max(ROUNDING, SLACK_PX / unit_px):
            raise BoxError(f"{frame} box {given} leaves the {width} x {height} px image")
    return found
