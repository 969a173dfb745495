"""Cutting a step: nothing lost, nothing twice, budgets kept."""

from __future__ import annotations

import pytest
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


@given(LENGTHS, st.integers(1, 4))
def test_ranks_share_all_groups_and_none_is_idle(costs, num_ranks):
    if len(costs) < num_ranks:
        with pytest.raises(ValueError, match="ranks"):
            spread(costs, num_ranks)
        return
    shares = spread(costs, num_ranks)
    assert sorted(index for share in shares for index in share) == list(range(len(costs)))
    assert all(shares)
    loads = [sum(costs[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs)
