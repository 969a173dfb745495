"""Cutting a step: nothing lost, nothing twice, budgets kept."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sif_ray.learner.microbatches import pack, split_branches, spread

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40)


def test_branches_that_fit_stay_together():
    assert split_branches(10, [5, 5, 5], budget=25) == [[0, 1, 2]]
    assert split_branches(10, [5, 5, 5], budget=20) == [[0, 1], [2]]


@given(st.integers(0, 100), LENGTHS, st.integers(1, 400))
def test_pieces_hold_every_branch_once_within_the_budget(prefix, lengths, budget):
    pieces = split_branches(prefix, lengths, budget)
    assert [branch for piece in pieces for branch in piece] == list(range(len(lengths)))
    assert all(len(p) == 1 or prefix + sum(lengths[branch] for branch in p) <= budget for p in pieces)


@given(LENGTHS, st.integers(1, 400))
def test_padded_micro_batches_hold_every_sequence_once_within_the_budget(lengths, budget):
    batches = pack(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(b) == 1 or len(b) * max(lengths[index] for index in b) <= budget for b in batches)


@given(LENGTHS, st.integers(1, 50))
def test_ranks_share_all_groups_as_evenly_as_the_largest_allows(costs, num_ranks):
    shares = spread(costs, num_ranks)
    assert len(shares) == num_ranks
    assert sorted(index for share in shares for index in share) == list(range(len(costs)))
    assert sum(map(bool, shares)) == min(num_ranks, len(costs))
    loads = [sum(costs[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs)


def test_long_tailed_lengths_leave_little_padding_and_even_ranks():
    # 64 groups of 8 completions, log-normal around 300 tokens up to 2048, behind 700 tokens of prompt and images
    rng = np.random.default_rng(0)
    padding, imbalance = [], []
    for _ in range(20):
        lengths_NG = np.minimum(2048, rng.lognormal(np.log(300), 0.8, (64, 8))).astype(int)
        shares = spread([700 + int(lengths_G.sum()) for lengths_G in lengths_NG], 8)
        loads = []
        for share in shares:
            pieces = [
                700 + sum(int(lengths_NG[group][branch]) for branch in chosen)
                for group in share
                for chosen in split_branches(700, lengths_NG[group].tolist(), 16384)
            ]
            computed = sum(len(b) * max(pieces[i] for i in b) for b in pack(pieces, 16384))
            padding.append(1 - sum(pieces) / computed)
            loads.append(computed)
        imbalance.append(max(loads) / np.mean(loads))
    assert np.mean(padding) < 0.05  # 0.023
    assert np.mean(imbalance) < 1.05  # the busiest of 8 ranks against their mean: 1.016
