"""The HTTP gateway as a deployment."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from sif_ray.config import ServeConfig
from sif_ray.rollout.errors import EngineDiedError
from sif_ray.serve.access import Keys
from sif_ray.serve.api import build_api
from sif_ray.serve.backends import Ask, Generation, Refused
from sif_ray.serve.meter import Meter
from sif_ray.serve.refusal import RequestRefused
from sif_ray.serve.service import SifService

LOST = (EngineDiedError, RayActorError, DeploymentUnavailableError, ReplicaUnavailableError)
RETRY_LOST_S = 10  # an engine of a small policy is back by then

log = logging.getLogger(__name__)


class _RemotePolicy:
    """The policy's replicas. Whoever stops waiting ends the request in the engine."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._whole, self._parts = handle.generate, handle.options(stream=True).stream

    async def generate(self, ask: Ask) -> Generation | Refused:
        with _refusing("policy"):
            return await _cancelling(self._whole.remote(ask))

    async def stream(self, ask: Ask) -> AsyncIterator[Generation | Refused]:
        parts = self._parts.remote(ask)
        try:
            with _refusing("policy"):
                async for part in parts:
                    yield part
        finally:
            parts.cancel()


async def _cancelling(response: DeploymentResponse) -> Any:
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """What a client can wait out is a 503 with the time to wait, not an error of the server."""
    try:
        yield
    except BackPressureError as error:
        raise RequestRefused(503, f"the {name}'s queue is full; ask again", {"Retry-After": "1"}) from error
    except LOST as error:
        log.warning("a request was lost with a replica of the %s: %s", name, error)
        raise RequestRefused(
            503, f"the {name} that worked on this was lost; ask again", {"Retry-After": str(RETRY_LOST_S)}
        ) from error


# Its log has one line of JSON per request (`sif_ray.serve.meter`) instead of Serve's own.
@serve.deployment(ray_actor_options={"num_cpus": 0.1}, logging_config={"encoding": "JSON", "enable_access_log": False})
@serve.ingress()
class Gateway:
    def __init__(self, config: ServeConfig, depth: DeploymentHandle, policy: DeploymentHandle) -> None:
        async def estimate(photo: bytes) -> bytes:
            with _refusing("depth model"):
                encoded: bytes = await _cancelling(depth.estimate.remote(photo))
                return encoded

        self._keys = Keys.read(config)
        self._service = SifService(config, estimate, _RemotePolicy(policy))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._service, self._keys, missing=_missing, observe=Meter())


async def _missing() -> list[str]:
    """The deployments of this application without a replica that works."""
    name = serve.get_replica_context().app_name
    application = (await asyncio.to_thread(serve.status)).applications[name]
    return [name for name, found in application.deployments.items() if not found.replica_states.get("RUNNING")]
