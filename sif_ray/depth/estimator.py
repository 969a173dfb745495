"""Depth Anything through transformers: photographs in, depth_rel (0 = near, 1 = far, per image) out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForDepthEstimation

from sif_ray.depth.checkpoint import resolve_model
from sif_ray.method.depth_code import from_disparity

log = logging.getLogger(__name__)

NON_COMMERCIAL = ("Base", "Large", "Giant")
"""Sizes of Depth Anything V2 under CC-BY-NC-4.0; Small is Apache-2.0."""


class DepthEstimator:
    """A depth model on one device. `model` is "toy" (the committed tiny one), a checkpoint folder or a hub id.

    Example: `DepthEstimator("depth-anything/Depth-Anything-V2-Small-hf").estimate([photo])[0]` is an (H, W) array.
    """

    def __init__(self, model: str, device: str | None = None) -> None:
        source = resolve_model(model)
        if any(size in Path(model).name for size in NON_COMMERCIAL):
            log.warning("%s: Depth Anything V2 Base, Large and Giant are CC-BY-NC-4.0, Small is Apache-2.0", model)
        self.name = Path(source).name
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._processor = AutoImageProcessor.from_pretrained(source)
        self._model = AutoModelForDepthEstimation.from_pretrained(source, use_safetensors=True).to(self._device).eval()

    def estimate(self, photos: Sequence[Image.Image]) -> list[npt.NDArray[np.float32]]:
        """depth_rel (height, width) float32 of every RGB photo, in order. Photos of one size are one batch."""
        order = sorted(range(len(photos)), key=lambda index: photos[index].size)
        found: dict[int, npt.NDArray[np.float32]] = {}
        for _, members in groupby(order, key=lambda index: photos[index].size):
            batch = list(members)
            found |= dict(zip(batch, self._estimate_batch([photos[index] for index in batch]), strict=True))
        return [found[index] for index in range(len(photos))]

    @torch.inference_mode()
    def _estimate_batch(self, photos: Sequence[Image.Image]) -> list[npt.NDArray[np.float32]]:
        inputs = self._processor(images=list(photos), return_tensors="pt").to(self._device)
        disparity = self._model(**inputs).predicted_depth.float()  # relative inverse depth: larger is nearer
        width, height = photos[0].size
        if disparity.shape[-2:] != (height, width):
            disparity = torch.nn.functional.interpolate(
                disparity[:, None], (height, width), mode="bicubic", align_corners=False
            )[:, 0]
        return [from_disparity(image).astype(np.float32) for image in disparity.cpu().numpy()]
