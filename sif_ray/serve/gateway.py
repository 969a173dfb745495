"""The HTTP gateway as a deployment."""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
import numpy.typing as npt
from fastapi import FastAPI
from PIL import Image
from ray import serve
from ray.serve.handle import DeploymentHandle

from sif_ray.config import ServeConfig
from sif_ray.serve.api import build_api
from sif_ray.serve.service import Ask, Generation, Refused, SifService

GATEWAY_REQUESTS = 256  # it waits more than it works


class _RemotePolicy:
    """The policy's replicas."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._whole, self._parts = handle.generate, handle.options(stream=True).stream

    async def generate(self, ask: Ask) -> Generation | Refused:
        return await self._whole.remote(ask)

    async def stream(self, ask: Ask) -> AsyncIterator[Generation | Refused]:
        parts = self._parts.remote(ask)
        try:
            async for part in parts:
                yield part
        finally:
            parts.cancel()  # nobody listens any more: the engine must not write on


@serve.deployment(max_ongoing_requests=GATEWAY_REQUESTS, ray_actor_options={"num_cpus": 0.1})
@serve.ingress()
class Gateway:
    def __init__(self, config: ServeConfig, depth: DeploymentHandle, policy: DeploymentHandle) -> None:
        async def estimate(photo: Image.Image) -> npt.NDArray[np.float32]:
            return await depth.estimate.remote(photo)

        self._service = SifService(config, estimate, _RemotePolicy(policy))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._service)
