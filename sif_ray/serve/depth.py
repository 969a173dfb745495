"""The depth model as a deployment."""

from __future__ import annotations

import asyncio
import hashlib

from ray import serve

from sif_ray.config import ServeConfig
from sif_ray.datagen.pictures import decode
from sif_ray.depth.encoding import coloured
from sif_ray.depth.known import KnownDepth

DEPTH_WAIT_S = 0.01  # for a batch to fill; small beside a generation


@serve.deployment(logging_config={"enable_access_log": False})  # the gateway writes one line per request
class Depth:
    def __init__(self, config: ServeConfig) -> None:
        self._known = KnownDepth(config)
        self.estimate.set_max_batch_size(config.depth_batch_size)

    @serve.batch(batch_wait_timeout_s=DEPTH_WAIT_S)
    async def estimate(self, photos: list[bytes]) -> list[bytes]:
        """One encoded photograph in, its `depth_png` out; Serve collects the calls of several requests."""
        return await asyncio.to_thread(self._estimate, photos)

    def _estimate(self, photos: list[bytes]) -> list[bytes]:
        keys = [hashlib.sha256(photo).hexdigest() for photo in photos]
        grays = self._known.grays((key, decode(photo)) for key, photo in zip(keys, photos, strict=True))
        return [coloured(grays[key]) for key in keys]
