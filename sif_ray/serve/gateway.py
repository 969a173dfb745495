"""The HTTP gateway as a deployment."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from fastapi import FastAPI
from PIL import Image
from ray import serve
from ray.serve.handle import DeploymentHandle

from sif_ray.config import ServeConfig
from sif_ray.serve.api import build_api
from sif_ray.serve.service import Generation, Refused, SifService

GATEWAY_REQUESTS = 256  # it waits more than it works


@serve.deployment(max_ongoing_requests=GATEWAY_REQUESTS, ray_actor_options={"num_cpus": 0.1})
@serve.ingress()
class Gateway:
    def __init__(self, config: ServeConfig, depth: DeploymentHandle, policy: DeploymentHandle) -> None:
        async def estimate(photo: Image.Image) -> npt.NDArray[np.float32]:
            return await depth.estimate.remote(photo)

        async def generate(question: str, images: tuple[bytes, ...]) -> Generation | Refused:
            return await policy.generate.remote(question, images)

        self._service = SifService(config, estimate, generate)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._service)
