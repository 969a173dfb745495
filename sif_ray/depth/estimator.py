"""Depth Anything through transformers: photographs in, depth_rel (0 = near, 1 = far, per image) out."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForDepthEstimation

from sif_ray.depth.checkpoint import resolve_model
from sif_ray.method.depth_code import from_disparity


@dataclass(frozen=True)
class ModelInput:
    """A photograph in the size that the model takes: far less memory than a large photograph itself."""

    pixels_3hw: torch.Tensor  # (3, h, w) float32, normalised
    width: int  # px, of the photograph
    height: int  # px


class DepthEstimator:
    """A depth model on one device. `model` is "toy" (the committed tiny one), a checkpoint folder or a hub id.

    Example: `DepthEstimator("depth-anything/Depth-Anything-V2-Small-hf").estimate([photo])[0]` is an (H, W) array.
    """

    def __init__(self, model: str, device: str | None = None, batch_size: int = 16) -> None:
        """`batch_size`: photographs of one pass at most, on a GPU; on a CPU it is 1. There batches are no faster, and
        would make the last bits of a photograph's depth depend on its neighbours."""
        source = resolve_model(model)
        self.name = Path(source).name
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._batch_size = batch_size if self._device != "cpu" else 1
        self._processor = AutoImageProcessor.from_pretrained(source)
        model = AutoModelForDepthEstimation.from_pretrained(source, use_safetensors=True).to(self._device).eval()
        self._model = model.to(memory_format=torch.channels_last)  # a tenth faster: it is mostly convolutions

    @functools.cached_property
    def identity(self) -> str:
        """Name and short hash of everything that an estimate follows from: weights and preparation of the photo."""
        digest = hashlib.sha256(json.dumps(self._processor.to_dict(), sort_keys=True, default=str).encode())
        for name, weights in sorted(self._model.state_dict().items()):
            digest.update(name.encode())
            digest.update(weights.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return f"{self.name}-{digest.hexdigest()[:16]}"

    def estimate(self, photos: Sequence[Image.Image]) -> list[npt.NDArray[np.float32]]:
        """depth_rel (height, width) float32 of every RGB photo, in order."""
        found = dict(self.estimate_each([self.prepare(photo) for photo in photos]))
        return [found[index] for index in range(len(photos))]

    def prepare(self, photo: Image.Image) -> ModelInput:
        """What `estimate_each` wants to know of an RGB photo, so that the photo itself can be forgotten."""
        pixels_13hw = self._processor(images=photo, return_tensors="pt")["pixel_values"]
        return ModelInput(pixels_13hw[0], *photo.size)

    def estimate_each(self, inputs: Sequence[ModelInput]) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """(index, depth_rel (height, width) float32) of every input, batch by batch: inputs of one shape together."""

        def shape(index: int) -> torch.Size:
            return inputs[index].pixels_3hw.shape

        for _, members in groupby(sorted(range(len(inputs)), key=shape), key=shape):
            batch = list(members)
            for start in range(0, len(batch), self._batch_size):
                indices = batch[start : start + self._batch_size]
                yield from zip(indices, self._estimate_batch([inputs[index] for index in indices]), strict=True)

    @torch.inference_mode()
    def _estimate_batch(self, inputs: Sequence[ModelInput]) -> list[npt.NDArray[np.float32]]:
        pixels_N3hw = torch.stack([item.pixels_3hw for item in inputs]).to(self._device)
        disparity_Nhw = self._model(pixel_values=pixels_N3hw).predicted_depth.float()  # inverse depth: larger is nearer
        return [_depth_rel(disparity_hw, item) for disparity_hw, item in zip(disparity_Nhw, inputs, strict=True)]


def _depth_rel(disparity_hw: torch.Tensor, item: ModelInput) -> npt.NDArray[np.float32]:
    if disparity_hw.shape != (item.height, item.width):  # as Depth Anything's own code does it
        disparity_hw = torch.nn.functional.interpolate(
            disparity_hw[None, None], (item.height, item.width), mode="bilinear", align_corners=True
        )[0, 0]
    return from_disparity(disparity_hw.cpu().numpy()).astype(np.float32)
