"""The suite `learner` on a load so small that its figures mean nothing."""

from __future__ import annotations

import pytest

from sif_ray.bench.learner import Load, make_groups, measure_memory, measure_throughput
from sif_ray.resources.shapes import PolicyShape

SMALL = Load(
    groups=3,
    group_size=3,
    median_tokens=10,
    max_tokens=40,
    micro_batch_tokens=512,
    threads=1,
    steps=1,
    shape=PolicyShape(64, 1, 2, 2, 128, 600, False, 96, 1, 3, 192),
    vocabulary_shape=PolicyShape(64, 1, 2, 2, 128, 20_000, False, 96, 1, 3, 192),
    vocabulary_tokens=96,
)


@pytest.mark.slow
def test_all_ways_train_the_same_tokens_to_the_same_loss_and_gradients(tmp_path):
    found = measure_throughput(tmp_path, 1, SMALL)
    lengths = [
        len(rollout.token_ids_T)
        for scored in make_groups(str(tmp_path / "policy"), SMALL)
        for rollout in scored.group.rollouts
    ]
    assert found.figures["tokens_of_a_step"] == sum(lengths)
    assert max(lengths) == found.figures["completion_tokens"]["max"] <= 40
    assert found.figures["tokens_per_s"].keys() == {"learner", "packed", "padded"}
    assert max(found.figures["apart"].values()) < 1e-4
    assert 0 <= found.figures["padding_share"]["learner"] < 1


@pytest.mark.slow
def test_log_probs_in_parts_equal_those_from_whole_logits(tmp_path):
    found = measure_memory(tmp_path, 1, SMALL)
    assert found.figures["logprob_tokens"] == 96
    assert max(found.figures["logprob_apart"].values()) < 1e-4
    assert all(peak["median"] > 0 for peak in found.figures["logprob_peak_gib"].values())
