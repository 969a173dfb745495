"""The Ray Serve application: a gateway that speaks HTTP, a depth model that works in batches, a policy engine.

    client ──HTTP──► Gateway ──photo──► Depth (Depth Anything, waits a moment to fill a batch)
                        │   ◄─depth map─┘
                        └──question, photo, depth image──► Policy (vLLM, continuous batching)
                        ◄──text, policy version────────────┘

Each deployment is a thin shell in a file of its own, so that the gateway's process loads neither torch nor vLLM.
"""

from __future__ import annotations

from ray import serve

from sif_ray.config import ServeConfig
from sif_ray.serve.depth import DEPTH_BATCH, Depth
from sif_ray.serve.gateway import Gateway
from sif_ray.serve.policy import Policy

BESIDE = 64
"""Requests of a gateway beside `max_requests`: refusals that say when to ask again, questions after its health."""


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
    gateway = Gateway.options(max_ongoing_requests=config.max_requests + BESIDE)
    return gateway.bind(config, depth, policy)
