"""The Ray Serve application: a gateway that speaks HTTP, a depth model that works in batches, a policy engine.

    client ──HTTP──► Gateway ──photo──► Depth (Depth Anything, waits a moment to fill a batch)
                        │   ◄─depth map─┘
                        └──question, photo, depth image──► Policy (vLLM, continuous batching)
                        ◄──text, policy version────────────┘

Each deployment is a thin shell around a class that runs without Ray. When the queue of the policy is full, Serve
answers 503.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from sif_ray.config import SamplingConfig, ServeConfig
from sif_ray.depth.estimator import DepthEstimator
from sif_ray.policy.processor import PolicyInputError
from sif_ray.rollout.engine import RolloutEngine, RolloutRequest, RolloutRequestError
from sif_ray.serve.api import build_api
from sif_ray.serve.images import RequestRefused
from sif_ray.serve.service import Generation, SifService

DEPTH_BATCH = 8
DEPTH_WAIT_S = 0.01  # for a batch to fill; small beside a generation
GATEWAY_REQUESTS = 256  # it waits more than it works

_ONE_LINE_PER_REQUEST = {"enable_access_log": False}  # the gateway has written it


def build_app(config: ServeConfig) -> serve.Application:
    """The application of a validated configuration, for `serve.run`."""
    engine = config.engine
    depth = Depth.options(
        max_ongoing_requests=2 * DEPTH_BATCH,
        ray_actor_options={"num_cpus": config.depth_num_cpus, "num_gpus": config.depth_num_gpus},
    ).bind(config.depth_model)
    policy = Policy.options(
        max_ongoing_requests=engine.max_num_seqs,
        max_queued_requests=4 * engine.max_num_seqs,
        ray_actor_options={"num_cpus": engine.num_cpus, "num_gpus": engine.num_gpus},
    ).bind(config)
    return Gateway.bind(config, depth, policy)


@dataclass(frozen=True)
class Refused:
    """A request that the policy cannot take; a value, because an error would come back wrapped in a remote one."""

    message: str


@serve.deployment(logging_config=_ONE_LINE_PER_REQUEST)
class Depth:
    def __init__(self, model: str) -> None:
        self._estimator = DepthEstimator(model)

    @serve.batch(max_batch_size=DEPTH_BATCH, batch_wait_timeout_s=DEPTH_WAIT_S)
    async def estimate(self, images: list[npt.NDArray[np.uint8]]) -> list[npt.NDArray[np.floating]]:
        """One image in, its depth_rel out; Serve collects the calls of several requests into the list."""
        return await asyncio.to_thread(self._estimator.estimate, images)


@serve.deployment(logging_config=_ONE_LINE_PER_REQUEST)
class Policy:
    async def __init__(self, config: ServeConfig) -> None:
        self._sampling = SamplingConfig(temperature=config.temperature, max_tokens=config.max_tokens)
        self._engine = RolloutEngine(config.policy, config.engine, config.prompt, max_pixels=config.max_pixels)
        self._requests = 0
        self._died = ""
        await self._engine.start()
        await self._engine.warm_up()

    async def generate(self, question: str, images: tuple[bytes, ...]) -> Generation | Refused:
        from sif_ray.rollout.vllm_client import EngineDiedError  # imports vLLM, which the gateway does without

        self._requests += 1
        name = f"request-{self._requests}"
        try:
            group = await self._engine.generate(RolloutRequest(name, name, question, images, 1, self._sampling))
        except (RolloutRequestError, PolicyInputError) as error:
            return Refused(str(error))
        except EngineDiedError as error:
            self._died = str(error)
            raise
        return Generation(group.rollouts[0].text, group.newest_version)

    async def check_health(self) -> None:
        """Serve replaces a replica whose engine is gone."""
        if self._died:
            raise RuntimeError(self._died)

    async def __del__(self) -> None:
        await self._engine.shutdown()


@serve.deployment(max_ongoing_requests=GATEWAY_REQUESTS, ray_actor_options={"num_cpus": 0.1})
@serve.ingress()
class Gateway:
    def __init__(self, config: ServeConfig, depth: DeploymentHandle, policy: DeploymentHandle) -> None:
        async def estimate(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.floating]:
            return await depth.estimate.remote(rgb)

        async def generate(question: str, images: tuple[bytes, ...]) -> Generation:
            outcome = await policy.generate.remote(question, images)
            if isinstance(outcome, Refused):
                raise RequestRefused(422, outcome.message)
            return outcome

        self._service = SifService(config, estimate, generate)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._service)
