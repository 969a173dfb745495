"""Layouts hold every actor once, stay within the machines, and impossible ones are refused with the way out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sif_ray.config import ConfigError, EngineConfig, GrpoConfig, LearnerConfig, PlacementConfig, load
from sif_ray.resources.placement import lay_out
from sif_ray.resources.plan import describe, make_plan

SPLIT = [
    "policy=Qwen/Qwen2.5-VL-7B-Instruct", "placement.gpus_per_node=8", "learner.num_gpus_per_rank=1",
    "learner.num_ranks=4", "num_engines=4", "engine.num_gpus=1", "learner.dtype=bfloat16", "learner.zero_stage=3",
    "learner.gradient_checkpointing=true", "weight_transfer=nccl",
]  # fmt: skip
COLOCATED = [
    *SPLIT, "placement.colocate=true", "weight_transfer=object_store", "ray.object_store_mib=40000",
    "learner.num_gpus_per_rank=0.5", "engine.num_gpus=0.5", "learner.lora.rank=8",
    "learner.freeze_vision=true", "engine.gpu_memory_utilization=0.5",
]  # fmt: skip


@given(
    nodes=st.integers(1, 4),
    gpus=st.integers(1, 8),
    ranks=st.integers(1, 16),
    engines=st.integers(1, 16),
    size=st.sampled_from([1, 2, 4]),
    rewards=st.integers(1, 5),
    colocate=st.booleans(),
)
def test_every_actor_has_one_place_and_no_machine_is_overbooked(nodes, gpus, ranks, engines, size, rewards, colocate):
    if colocate:
        engines, size = ranks, 1
    config = GrpoConfig(
        num_engines=engines,
        num_reward_workers=rewards,
        engine=EngineConfig(num_gpus=0.5 if colocate else float(size), tensor_parallel_size=size),
        learner=LearnerConfig(num_ranks=ranks, num_gpus_per_rank=0.5 if colocate else 1.0),
        placement=PlacementConfig(nodes=nodes, gpus_per_node=gpus, colocate=colocate),
    )
    needed = ranks if colocate else ranks + engines * size
    try:
        layout = lay_out(config)
    except ConfigError:
        # Refused only where it is too much, or where no machine has `size` GPUs left beside the others.
        assert needed > nodes * gpus or size > gpus or (size > 1 and needed + nodes * (size - 1) > nodes * gpus)
        return
    assert needed <= nodes * gpus
    seats = [seat for bundle in layout.bundles for seat in bundle.seats]
    assert sorted(seat.actor for seat in seats) == sorted(
        [f"learner {i}" for i in range(ranks)]
        + [f"engine {i}" for i in range(engines)]
        + [f"reward {i}" for i in range(rewards)]
    )
    assert len(layout.nodes) <= nodes
    assert all(sum(bundle.num_gpus for bundle in node) <= gpus for node in layout.nodes)
    assert all(bundle.num_gpus == sum(seat.num_gpus for seat in bundle.seats) for bundle in layout.bundles)
    assert sum(bundle.num_gpus for bundle in layout.bundles) == needed


def test_two_machines_keep_learner_and_engines_together():
    pairs = ["num_engines=4", "engine.num_gpus=2", "engine.tensor_parallel_size=2"]
    layout = lay_out(load("grpo", None, [*SPLIT, *pairs, "placement.nodes=2", "learner.num_ranks=8"]))
    assert layout.strategy == "STRICT_PACK"
    first, second = ([seat.actor for bundle in node for seat in bundle.seats] for node in layout.nodes)
    assert first == [f"learner {rank}" for rank in range(8)] + ["reward 0"]
    assert second == [f"engine {index}" for index in range(4)]


def test_without_gpus_ray_packs_what_fits_where():
    layout = lay_out(load("grpo", None, ["learner.num_ranks=2", "placement.nodes=3"]))
    assert layout.strategy == "PACK" and len(layout.nodes) == 1
    assert [bundle.num_gpus for bundle in layout.bundles] == [0.0] * 4


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["num_engines=5"], ["9 GPUs (4 learner ranks + 5 engines x 1)", "1 x 8", "engine 4", "lower"]),
        (["learner.num_gpus_per_rank=0.5"], ["learner.num_gpus_per_rank = 0.5", "placement.colocate"]),
        (["engine.num_gpus=0"], ["engine.num_gpus = 0", "GPUs"]),
        (["engine.num_gpus=0.5"], ["engine.num_gpus (0.5)", "engine.tensor_parallel_size"]),
        (["placement.gpus_per_node=0"], ["learner.num_gpus_per_rank = 1", "placement.gpus_per_node = 0"]),
        (["engine.tensor_parallel_size=16", "engine.num_gpus=16"], ["tensor_parallel_size = 16", "one machine"]),
        (
            ["engine.tensor_parallel_size=8", "engine.num_gpus=8", "placement.nodes=5"],
            ["does not divide the policy's 28 attention heads", "use one of 1, 2, 4"],
        ),
        (
            ["policy=qwen2.5-vl-3b", "engine.tensor_parallel_size=8", "engine.num_gpus=8", "placement.nodes=5"],
            ["does not divide the policy's 3420 vision MLP columns", "use one of 1, 2, 4"],
        ),
        (
            ["learner.zero_stage=0"],
            ["a learner rank needs about", "set learner.zero_stage to 3", "gpu_memory_gib = 80"],
        ),
        (
            ["learner.gradient_checkpointing=false"],
            ["a learner rank needs about", "set learner.gradient_checkpointing"],
        ),
        (
            ["policy=qwen2.5-vl-72b", "learner.lora.rank=8"],
            ["no sequence of engine.max_model_len", "raise engine.gpu_memory_utilization"],
        ),
        (["max_pixels=3000000"], ["engine.max_model_len (4096) is below 7652 image tokens", "raise it to 9892"]),
    ],
)
def test_an_impossible_split_layout_is_refused_with_the_way_out(overrides, words):
    make_plan(load("grpo", None, SPLIT))
    with pytest.raises(ConfigError) as error:
        make_plan(load("grpo", None, [*SPLIT, *overrides]))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["num_engines=3"], ["num_engines = 3", "learner.num_ranks = 4", "make them equal"]),
        (["engine.num_gpus=0.75"], ["exceed the one GPU they share", "0.5 and 0.5"]),
        (["engine.num_gpus=2", "engine.tensor_parallel_size=2"], ["engine.tensor_parallel_size = 2", "one GPU"]),
        (["ray.object_store_mib=30000"], ["ray.object_store_mib = 30000", "weight updates", "raise it to"]),
        (["engine.gpu_memory_utilization=0.9"], ["a colocated learner rank needs about", "0.9 of 80 GiB", "lower"]),
    ],
)
def test_an_impossible_colocated_layout_is_refused_with_the_way_out(overrides, words):
    make_plan(load("grpo", None, COLOCATED))
    with pytest.raises(ConfigError) as error:
        make_plan(load("grpo", None, [*COLOCATED, *overrides]))
    for word in words:
        assert word in str(error.value)


def test_a_policy_of_unknown_shape_has_a_placement_and_no_estimate():
    config = load("grpo", None, [*SPLIT, "policy=somebody/some-model"])
    shown = describe(config, make_plan(config))
    assert "GPU 7    engine 3 (1 CPU, 1 GPU)" in shown
    assert "Memory: no estimate (somebody/some-model is not here" in shown


def test_an_estimate_says_what_it_is_made_of():
    config = load("grpo", None, COLOCATED)
    plan = make_plan(config)
    shown = describe(config, plan)
    assert "GPU 3    learner 3 (1 CPU, 0.5 GPU) + engine 3 (1 CPU, 0.5 GPU)" in shown
    assert plan.learner is not None and plan.engine is not None
    assert f"fullest GPU: {(plan.learner.total + plan.engine.total) / 2**30:.1f} of 80 GiB" in shown
    assert f"{plan.engine.sequences} sequences of 4096 tokens" in shown
    for part in ("weights", "optimiser", "activations", "logits", "process"):
        assert part in shown
