"""A GRPO run on a cluster whose nodes have the roles of its layout as labels, as cluster/kuberay labels its groups."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest

from sif_ray.config import EngineConfig, GrpoConfig, LearnerConfig, PlacementConfig
from sif_ray.resources.placement import ROLE_LABEL, lay_out

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

CONFIG = GrpoConfig(
    num_engines=2,
    num_reward_workers=2,
    engine=EngineConfig(num_gpus=1.0),
    learner=LearnerConfig(num_ranks=2, num_gpus_per_rank=1.0, num_cpus_per_rank=2.0),
    placement=PlacementConfig(nodes=3, gpus_per_node=2),
)


def place(address: str, answers: Any) -> None:
    """The driver, a process of its own: role of every actor's node by the actor's name."""
    import ray
    from ray.util.placement_group import placement_group_table

    from sif_ray.loop.reservation import reserved

    ray.init(address=address)
    roles = {node["NodeID"]: node["Labels"].get(ROLE_LABEL) for node in ray.nodes()}
    layout = lay_out(CONFIG)
    with reserved(layout, timeout_s=60, can_grow=True) as room:
        found = {}
        for seat in (seat for bundle in layout.bundles for seat in bundle.seats):
            place = room.options(seat.actor)["scheduling_strategy"]
            bundles = placement_group_table(place.placement_group)["bundles_to_node_id"]
            found[seat.actor] = roles[bundles[place.placement_group_bundle_index]]
    answers.put(found)


def test_every_part_goes_to_the_machine_that_is_labelled_for_it() -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        # The smallest share of the run would fit into any of them, and the first one is not the learner's.
        for role in ("rollout", "learner", "judge"):
            cluster.add_node(num_cpus=8, num_gpus=2, labels={ROLE_LABEL: role})
        context = multiprocessing.get_context("spawn")
        answers = context.Queue()
        driver = context.Process(target=place, args=(cluster.address, answers))
        driver.start()
        found = answers.get(timeout=120)
        driver.join(30)
    finally:
        cluster.shutdown()
    expected = {"learner": "learner", "engine": "rollout", "reward": "judge"}
    assert found == {actor: expected[actor.split()[0]] for actor in found} and len(found) == 6
