"""How an optimiser step is cut into forward and backward passes of bounded size."""

from __future__ import annotations

import math
from collections.abc import Sequence


def split_branches(prefix_length: int, branch_lengths_K: Sequence[int], budget: int) -> list[list[int]]:
    """Branch indices of one sequence in pieces of at most `budget` tokens; every piece repeats the prefix.

    A branch that exceeds the budget on its own gets a piece of its own. Order is kept, so pieces of a sequence that
    fits are one piece with every branch.
    """
    pieces: list[list[int]] = []
    used = 0
    for branch, length in enumerate(branch_lengths_K):
        if not pieces or used + length > budget:
            pieces.append([])
            used = prefix_length
        pieces[-1].append(branch)
        used += length
    return pieces


PASSES_PER_BUDGET = 32  # a further pass is worth it where it saves a budget of tokens / 32: one costs time of its own


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of the sequences of each micro-batch, longest sequences first.

    A micro-batch is padded to its longest sequence, so it costs count * longest tokens, at most `budget` unless one
    sequence alone exceeds it. Neighbours in length share a micro-batch, cut where padded tokens and passes together
    cost least.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    costs, starts = [0.0], [0]  # of the best cut of the first n sequences, and where its last micro-batch starts
    for end in range(1, len(order) + 1):
        best, start = math.inf, end - 1
        for first in range(end - 1, -1, -1):
            positions = (end - first) * lengths[order[first]]
            if positions > budget and first < end - 1:
                break
            if costs[first] + positions < best:
                best, start = costs[first] + positions, first
        costs.append(best + budget / PASSES_PER_BUDGET)
        starts.append(start)
    batches: list[list[int]] = []
    end = len(order)
    while end:
        batches.append(order[starts[end] : end])
        end = starts[end]
    return batches[::-1]


def spread(costs: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Indices for every rank, with costs as even as taking the largest first gives; of fewer items than ranks, some get
    none."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += max(1, costs[index])
    return shares
