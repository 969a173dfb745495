"""Completions that share a prompt, in one sequence: the prompt and its images are computed once per group.

A `BranchedSequence` is a prefix (prompt with images) and K branches (completions, or questions with their answers). In
the packed sequence every branch sees the prefix and itself, and its positions continue those of the prefix, so the
log-probs equal those of K separate sequences.

    prefix  p p p p
    branch0         a a a        sees p, a
    branch1               b b    sees p, b
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

HEAD_CHUNKS = 8  # a fixed count: under ZeRO-3 every rank must use the output layer equally often
FORBIDDEN_LOGIT = -1e9  # finite, so that its part of an entropy is 0 and not NaN


@dataclass(frozen=True)
class BranchedSequence:
    """One prefix and its branches. `loss_masks` says which branch tokens are predicted (None = all)."""

    prefix_ids: Sequence[int]  # image placeholders expanded
    branches: Sequence[Sequence[int]]
    pixel_values: npt.NDArray[np.float32]  # patches of the prefix's images
    image_grid_thw: Sequence[tuple[int, int, int]]
    loss_masks: Sequence[Sequence[bool]] | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prefix_ids) + sum(map(len, self.branches))

    def choose(self, branches: Sequence[int]) -> BranchedSequence:
        """The same prefix with only these branches, by their numbers."""
        masks = self.loss_masks
        return replace(
            self,
            branches=[self.branches[number] for number in branches],
            loss_masks=None if masks is None else [masks[number] for number in branches],
        )


@dataclass(frozen=True)
class BranchedBatch:
    """B branched sequences padded to length L, and the M branch tokens to predict, as flat index lists.

    Token m stands at `target_at_M` of the flattened (B * L) sequence and is predicted by the state at `state_at_M`;
    it belongs to branch `branch_M`, counted through the batch in order.
    """

    input_ids: torch.Tensor  # (B, L)
    position_ids: torch.Tensor  # (3, B, L): time, height, width
    attention_mask: torch.Tensor  # (B, 1, L, L), True = may attend
    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor
    state_at_M: torch.Tensor
    target_at_M: torch.Tensor
    branch_M: torch.Tensor
    num_branches: int

    def to(self, device: torch.device) -> BranchedBatch:
        moved = {
            key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in vars(self).items()
        }
        return BranchedBatch(**moved)


def collate(sequences: Sequence[BranchedSequence], policy: nn.Module, pad_token_id: int) -> BranchedBatch:
    """Pack and pad branched sequences for one forward pass of `policy`."""
    length = max(sequence.num_tokens for sequence in sequences)
    size = len(sequences)
    input_ids = torch.full((size, length), pad_token_id)
    position_ids = torch.zeros(3, size, length, dtype=torch.long)
    segments = torch.full((size, length), -1)  # 0 = prefix, k + 1 = branch k, -1 = padding
    state_at: list[int] = []
    target_at: list[int] = []
    branch_of: list[int] = []
    branch_number = 0
    for row, sequence in enumerate(sequences):
        at = len(sequence.prefix_ids)
        input_ids[row, :at] = torch.as_tensor(np.asarray(sequence.prefix_ids, dtype=np.int64))
        segments[row, :at] = 0
        position_ids[:, row, :at] = _prefix_positions(sequence, policy)
        start = int(position_ids[:, row, :at].max()) + 1
        for number, branch in enumerate(sequence.branches):
            end = at + len(branch)
            input_ids[row, at:end] = torch.as_tensor(np.asarray(branch, dtype=np.int64))
            segments[row, at:end] = number + 1
            position_ids[:, row, at:end] = torch.arange(start, start + len(branch))
            mask = sequence.loss_masks[number] if sequence.loss_masks is not None else [True] * len(branch)
            for offset in np.flatnonzero(mask):
                before = at + offset - 1 if offset else len(sequence.prefix_ids) - 1
                state_at.append(row * length + int(before))
                target_at.append(row * length + at + int(offset))
                branch_of.append(branch_number)
            branch_number += 1
            at = end
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = segments[:, :, None] == segments[:, None, :]
    attention_mask = causal & (same | (segments[:, None, :] == 0))  # padding attends to padding: no empty rows
    return BranchedBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=attention_mask[:, None],
        pixel_values=torch.from_numpy(np.concatenate([sequence.pixel_values for sequence in sequences])),
        image_grid_thw=torch.tensor([grid for sequence in sequences for grid in sequence.image_grid_thw]),
        state_at_M=torch.tensor(state_at, dtype=torch.long),
        target_at_M=torch.tensor(target_at, dtype=torch.long),
        branch_M=torch.tensor(branch_of, dtype=torch.long),
        num_branches=branch_number,
    )


def branch_logits(policy: nn.Module, batch: BranchedBatch) -> torch.Tensor:
    """Next-token logits (M, vocabulary) before every branch token to predict; no other logits are computed.

    The image placeholder is out of the running, as it is in the engine: a completion holding it would ask for an image.
    """
    return _logits(policy, _states(policy, batch))


def branch_logprobs(
    policy: nn.Module, batch: BranchedBatch, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies in nats of the M branch tokens at a sampling temperature, each (M,) in float32. Only the
    log-probs carry a gradient.

    The logits are divided by the temperature exactly as the engine does before it samples. They are computed in
    `HEAD_CHUNKS` parts and again in the backward pass: over a vocabulary of 150,000 they would need more memory than
    all layers together.
    """
    states = _states(policy, batch)
    targets_M = batch.input_ids.flatten()[batch.target_at_M]
    parts = zip(states.tensor_split(HEAD_CHUNKS), targets_M.tensor_split(HEAD_CHUNKS), strict=True)
    scored = [checkpoint(_score, policy, *part, temperature, use_reentrant=False) for part in parts]
    logprobs, entropies = zip(*scored, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def hidden_states(policy: nn.Module, batch: BranchedBatch) -> torch.Tensor:
    """Of every position before the output layer, (B, L, width)."""
    hidden: torch.Tensor = policy.model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        pixel_values=batch.pixel_values,
        image_grid_thw=batch.image_grid_thw,
        use_cache=False,
    ).last_hidden_state
    return hidden


def _states(policy: nn.Module, batch: BranchedBatch) -> torch.Tensor:
    """Of the positions before a branch token, (M, width)."""
    return hidden_states(policy, batch).flatten(0, 1)[batch.state_at_M]


def _logits(policy: nn.Module, states: torch.Tensor) -> torch.Tensor:
    logits = policy.lm_head(states)
    placeholder = torch.tensor([policy.config.image_token_id], device=logits.device)
    return logits.index_fill(-1, placeholder, FORBIDDEN_LOGIT)


def _score(
    policy: nn.Module, states: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs = torch.log_softmax(_logits(policy, states).float() / temperature, dim=-1)
    with torch.no_grad():
        entropies = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropies


def _prefix_positions(sequence: BranchedSequence, policy: nn.Module) -> torch.Tensor:
    ids = torch.as_tensor(np.asarray(sequence.prefix_ids, dtype=np.int64))[None]
    kinds = (ids == policy.config.image_token_id).int()
    grid = torch.tensor(list(sequence.image_grid_thw)) if len(sequence.image_grid_thw) else None
    positions, _ = policy.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid)
    return positions[:, 0]
