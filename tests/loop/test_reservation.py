"""Room for a run is given at once or refused in words, and actors go where it was reserved."""

from __future__ import annotations

import pytest
import ray
from ray.util.placement_group import placement_group_table

from sif_ray.config import ConfigError, load
from sif_ray.loop.reservation import PlacementError, Reservation, reserved
from sif_ray.resources.placement import Bundle, Layout, Seat, lay_out


@ray.remote
class Actor:
    def place(self) -> tuple[str, str]:
        context = ray.get_runtime_context()
        return context.get_node_id(), context.get_placement_group_id()


def start(room: Reservation, actor: str):
    return Actor.options(**room.options(actor)).remote()


def alive_groups() -> list[str]:
    return [name for name, group in placement_group_table().items() if group["state"] != "REMOVED"]


def test_actors_are_in_the_room_and_the_room_is_given_back(ray_local):
    layout = lay_out(load("grpo", None, ["num_engines=2"]))
    with reserved(layout, timeout_s=30, can_grow=False) as room:
        (group,) = alive_groups()
        bundles = placement_group_table()[group]["bundles"]
        assert [bundles[index] for index in range(4)] == [{"CPU": 1.0}] * 4
        actors = [start(room, name) for name in ("learner 0", "engine 0", "engine 1", "reward 0")]
        assert {place[1] for place in ray.get([actor.place.remote() for actor in actors])} == {group}
        assert ray.available_resources().get("CPU", 0.0) == 0.0
        ray.kill(actors[1])
        replacement = start(room, "engine 0")  # every CPU is taken, but the place is still reserved
        assert ray.get(replacement.place.remote(), timeout=30)[1] == group
    assert alive_groups() == []


def test_learner_rank_and_engine_share_a_bundle(ray_local):
    config = load("grpo", None, ["learner.num_ranks=2", "num_engines=2", "placement.colocate=true"])
    halves = [Bundle(tuple(Seat(seat.actor, 0.5, 0.0) for seat in bundle.seats)) for bundle in lay_out(config).bundles]
    with reserved(Layout((tuple(halves[:2]),), "STRICT_PACK"), timeout_s=30, can_grow=False) as room:
        (group,) = alive_groups()
        assert placement_group_table()[group]["bundles"] == {0: {"CPU": 1.0}, 1: {"CPU": 1.0}}
        actors = [start(room, name) for name in ("learner 0", "engine 0", "learner 1", "engine 1")]
        assert {place[1] for place in ray.get([actor.place.remote() for actor in actors], timeout=60)} == {group}


def test_an_engine_that_joins_later_goes_where_there_is_room(ray_local):
    layout = lay_out(load("grpo"))
    with reserved(layout, timeout_s=30, can_grow=False) as room:
        assert room.options("engine 5") == {"num_cpus": 1.0, "num_gpus": 0.0}
        assert ray.get(start(room, "engine 5").place.remote(), timeout=30)[1] is None


def test_more_than_a_fixed_cluster_has_is_refused_at_once(ray_local):
    layout = lay_out(load("grpo", None, ["num_engines=9"]))
    complaint = r"11 logical CPUs \(1 learner \+ 9 engine \+ 1 reward\) exceed the 4"
    with pytest.raises(ConfigError, match=complaint), reserved(layout, timeout_s=30, can_grow=False):
        pass
    assert alive_groups() == []


def test_a_cluster_that_does_not_grow_in_time_is_said_to_lack_what_it_lacks(ray_local):
    config = load("grpo", None, ["placement.gpus_per_node=2", "learner.num_gpus_per_rank=1", "engine.num_gpus=1"])
    with pytest.raises(PlacementError) as error, reserved(lay_out(config), timeout_s=1.5, can_grow=True):
        pass
    for words in ("room for 0 of the run's 1 machines", "3 CPU + 2 GPU", "4 CPU + 0 GPU", "placement.timeout_s = 1.5"):
        assert words in str(error.value)
    assert alive_groups() == []
