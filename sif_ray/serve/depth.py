"""The depth model as a deployment."""

from __future__ import annotations

import asyncio

import numpy as np
import numpy.typing as npt
from PIL import Image
from ray import serve

from sif_ray.depth.estimator import DepthEstimator

DEPTH_BATCH = 8
DEPTH_WAIT_S = 0.01  # for a batch to fill; small beside a generation


@serve.deployment(logging_config={"enable_access_log": False})  # the gateway writes one line per request
class Depth:
    def __init__(self, model: str) -> None:
        self._estimator = DepthEstimator(model)

    @serve.batch(max_batch_size=DEPTH_BATCH, batch_wait_timeout_s=DEPTH_WAIT_S)
    async def estimate(self, photos: list[Image.Image]) -> list[npt.NDArray[np.float32]]:
        """One photograph in, its depth_rel (height, width) out; Serve collects the calls of several requests."""
        return await asyncio.to_thread(self._estimator.estimate, photos)
