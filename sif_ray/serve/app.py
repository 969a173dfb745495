"""The Ray Serve application: a gateway that speaks HTTP, a depth model that works in batches, a policy engine.

    client ──HTTP──► Gateway ──photo──► Depth (Depth Anything; waits a moment to fill a batch, remembers by content)
                        │   ◄──depth image──┘
                        └──question, photo, depth image──► Policy (vLLM, continuous batching)
                        ◄──text, policy version────────────┘

Each deployment is a thin shell in a file of its own, so that the gateway's process loads neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve

from sif_ray.config import ServeConfig, load_values
from sif_ray.policy.adapter import check_served_adapter
from sif_ray.policy.check import check_policy
from sif_ray.serve.depth import Depth
from sif_ray.serve.gateway import Gateway
from sif_ray.serve.policy import Policy

BESIDE = 64
"""Requests of a gateway beside `max_requests`: refusals that say when to ask again, questions after its health."""

BUSY = 0.75
"""Of the requests that a replica works on at once: above it, autoscaling wants another one."""

WAITING = 5
"""Times `max_num_seqs`: how many requests an engine has, those it writes included; the next is refused."""


def build_app(args: Mapping[str, Any] | ServeConfig) -> serve.Application:
    """The application, for `serve.run`, and for `serve deploy` and RayService, whose `args` are the keys of
    `ServeConfig`, as in `configs/serve.yaml`. Raises `ConfigError` for wrong ones, and for a policy or an adapter that
    could not be served.

    Where `args` change, a new version is rolled out: its replicas start beside the old ones, which finish what they
    have begun.
    """
    config = args if isinstance(args, ServeConfig) else load_values("serve", args)
    engine = config.engine
    check_policy(config.policy, engine_on_cpu=not engine.num_gpus)
    for name, adapter in config.adapters.items():
        check_served_adapter(adapter, config.policy, f"adapters.{name}")
    rollout = {"graceful_shutdown_timeout_s": config.timeout_s, "max_surge_percent": config.max_surge_percent}
    depth = Depth.options(
        **rollout,
        **_replicas(config.depth_actors_min, config.depth_actors_max, 2 * config.depth_batch_size),
        ray_actor_options={"num_cpus": config.depth_num_cpus, "num_gpus": config.depth_num_gpus},
    ).bind(config)
    policy = Policy.options(
        **rollout,
        # As many again wait inside the engine, which so has the next at hand when a sequence ends.
        **_replicas(config.actors_min, config.actors_max, engine.max_num_seqs, waiting=engine.max_num_seqs),
        max_queued_requests=(WAITING - 2) * engine.max_num_seqs,
        ray_actor_options={"num_cpus": engine.num_cpus, "num_gpus": engine.num_gpus},
    ).bind(config)
    gateway = Gateway.options(**rollout, **_replicas(config.gateways, config.gateways, config.max_requests + BESIDE))
    return gateway.bind(config, depth, policy)


def _replicas(fewest: int, most: int, at_once: int, waiting: int = 0) -> dict[str, Any]:
    """Options for a deployment whose replicas work on `at_once` requests each while `waiting` others wait inside."""
    if fewest == most:
        return {"num_replicas": fewest, "max_ongoing_requests": at_once + waiting}
    scaling = {"min_replicas": fewest, "max_replicas": most, "target_ongoing_requests": BUSY * at_once}
    return {"autoscaling_config": scaling, "max_ongoing_requests": at_once + waiting}
