"""Depth of photographs, estimated where no cache holds it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from PIL import Image

from sif_ray.config import DepthConfig
from sif_ray.depth.cache import DepthCache
from sif_ray.depth.encoding import gray_png
from sif_ray.depth.estimator import DepthEstimator, ModelInput
from sif_ray.storage import Folder


class KnownDepth:
    """A depth model and a cache of what it has said.

    Example: `KnownDepth(config).grays([(sha256, photo)])[sha256]` is the `gray_png` of a photograph.
    """

    def __init__(self, config: DepthConfig) -> None:
        """Load the model on as many threads as the actor has CPUs. Raises `ConfigError` for a cache out of reach."""
        torch.set_num_threads(max(1, int(config.depth_num_cpus)))
        self._estimator = DepthEstimator(config.depth_model, batch_size=config.depth_batch_size)
        folder = Folder.open(config.depth_cache, "depth_cache") if config.depth_cache else None
        self._cache = DepthCache(self._estimator.identity, folder)
        self.name = self._estimator.name

    def grays(self, photos: Iterable[tuple[str, Image.Image]]) -> dict[str, bytes]:
        """Gray PNGs by the key of each (key, RGB photo). No photo stays decoded; equal keys are estimated once."""
        known: dict[str, bytes] = {}
        unknown: dict[str, ModelInput] = {}
        for key, rgb in photos:
            if key in known or key in unknown:
                continue
            if (gray := self._cache.get(key)) is not None:
                known[key] = gray
            else:
                unknown[key] = self._estimator.prepare(rgb)
        keys = list(unknown)
        for index, depth_rel in self._estimator.estimate_each(list(unknown.values())):
            known[keys[index]] = gray_png(depth_rel)
            self._cache.put(keys[index], known[keys[index]])
        return known
