"""Attention for CPUs: in float32, and only where the mask lets anything be seen.

In a sequence of branches (`sif_ray.policy.branches`) most pairs of tokens do not see each other, but an attention call
with a dense mask computes all of them: eight branches of 96 tokens behind a prompt of 57 cost six times what is seen.
Here a sequence is cut where a token does not see the one before it and where what a part sees begins or ends, and each
part attends to the parts it sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FLOAT32_ATTENTION = "sdpa_float32"
"""Name of this attention for transformers. It leaves bfloat16 autocast: on a CPU its backward pass in bfloat16 is
several times slower."""


@dataclass(frozen=True)
class _Tile:
    """The queries of one part of a sequence and the parts that they see."""

    seen: Sequence[int]
    mask: Tensor  # (queries, keys of the parts seen), True = may attend


@dataclass(frozen=True)
class _Tiles:
    """One sequence: lengths of its parts, and a tile for each."""

    lengths: Sequence[int]
    tiles: Sequence[_Tile]


_TILES = WeakTensorKeyDictionary()  # of masks that are in use: all layers of a pass share one


def _tiles_of(mask: Tensor) -> list[_Tiles]:
    """Tiles of a mask (B, 1, L, L)."""
    if mask not in _TILES:
        _TILES[mask] = [_cut(of_sequence[0]) for of_sequence in mask]
    return _TILES[mask]


def _cut(mask: Tensor) -> _Tiles:
    """Tiles of the mask (L, L) of one sequence."""
    begins = 1 + (~mask.diagonal(-1)).nonzero().flatten()
    last_rows = mask[[*(begins - 1).tolist(), -1]]
    edges = 1 + (last_rows[:, 1:] != last_rows[:, :-1]).any(0).nonzero().flatten()
    cuts = sorted({0, len(mask), *begins.tolist(), *edges.tolist()})
    lengths = [end - start for start, end in pairwise(cuts)]
    tiles = []
    for rows in mask.split(lengths):
        parts = rows.split(lengths, dim=1)
        seen = [number for number, part in enumerate(parts) if part.any()]
        tiles.append(_Tile(seen, torch.cat([parts[number] for number in seen], dim=1)))
    return _Tiles(lengths, tiles)


def _attend_in_tiles(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """Attention of (B, heads, L, size) under a mask (B, 1, L, L), as (B, L, heads, size)."""
    rows = []
    for query_1, key_1, value_1, cut in zip(
        *(states.split(1) for states in (query, key, value)), _tiles_of(mask), strict=True
    ):
        # Split once and joined where needed: the gradient of a slice would be as long as the sequence, for each.
        keys, values = key_1.split(cut.lengths, dim=2), value_1.split(cut.lengths, dim=2)
        parts = [
            functional.scaled_dot_product_attention(
                part,
                torch.cat([keys[number] for number in tile.seen], dim=2),
                torch.cat([values[number] for number in tile.seen], dim=2),
                attn_mask=tile.mask,
                scale=scaling,
            )
            for part, tile in zip(query_1.split(cut.lengths, dim=2), cut.tiles, strict=True)
        ]
        rows.append(torch.cat(parts, dim=2))
    return torch.cat(rows).transpose(1, 2)


def _attend_in_float32(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    with torch.autocast(query.device.type, enabled=False):
        query32, key32, value32 = query.float(), key.float(), value.float()
        heads = (query.shape[1], key.shape[1])
        square = attention_mask is not None and attention_mask.shape[1:] == (1, query.shape[2], key.shape[2])
        if (
            square
            and query.shape[2] == key.shape[2]
            and attention_mask.dtype == torch.bool
            and not kwargs.get("dropout")
        ):
            if heads[0] != heads[1]:
                key32, value32 = (states.repeat_interleave(heads[0] // heads[1], 1) for states in (key32, value32))
            attended = _attend_in_tiles(query32, key32, value32, attention_mask, kwargs.get("scaling"))
        else:
            attended, _ = sdpa_attention_forward(module, query32, key32, value32, attention_mask, **kwargs)
    return attended.to(query.dtype), None


AttentionInterface.register(FLOAT32_ATTENTION, _attend_in_float32)
AttentionMaskInterface.register(FLOAT32_ATTENTION, sdpa_mask)
