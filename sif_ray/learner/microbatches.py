"""How an optimiser step is cut into forward and backward passes of bounded size."""

from __future__ import annotations

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


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of the sequences of each micro-batch, longest sequences first.

    A micro-batch is padded to its longest sequence, so it costs count * longest tokens, at most `budget` unless one
    sequence alone exceeds it. Neighbours in length share a micro-batch: little padding.
    """
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if not batches or (len(batches[-1]) + 1) * longest > budget:
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return batches


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
