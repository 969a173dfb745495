"""The GRPO objective as pure functions on flat tensors over the N trained tokens of a micro-batch.

Three policies appear. The *current* one carries the gradient. The *proximal* one (`old`) is what the clipped ratio is
taken against; with one update per batch it is the current policy itself, detached, so the ratio is 1 and clipping is
idle, exactly as in the released code (num_iterations = 1). The *behaviour* policy is what the engine sampled from: it
differs from the proximal one by numerics and by staleness, and a truncated importance weight corrects for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """Constants of the loss (defaults: GRPO as released with SIFThinker, plus the importance correction)."""

    clip_epsilon: float = 0.2
    kl_beta: float = 0.04  # weight of the KL against the frozen reference; 0 = no reference is held
    importance_cap: float = 2.0  # truncation of proximal / behaviour; 0 = no correction


def clipped_surrogate(logprobs_N: Tensor, old_logprobs_N: Tensor, advantages_N: Tensor, epsilon: float) -> Tensor:
    """-min(r A, clip(r, 1 - eps, 1 + eps) A), r = exp(logprob - old logprob), (N,) (PPO, arXiv 1707.06347, eq. 7)."""
    ratios = torch.exp(logprobs_N - old_logprobs_N)
    clipped = ratios.clamp(1 - epsilon, 1 + epsilon)
    return -torch.minimum(ratios * advantages_N, clipped * advantages_N)


def clipped_tokens(logprobs_N: Tensor, old_logprobs_N: Tensor, advantages_N: Tensor, epsilon: float) -> Tensor:
    """Whether the clip takes a token's gradient away, bool (N,)."""
    ratios = torch.exp(logprobs_N - old_logprobs_N)
    return ((ratios > 1 + epsilon) & (advantages_N > 0)) | ((ratios < 1 - epsilon) & (advantages_N < 0))


def k3_kl(logprobs_N: Tensor, reference_logprobs_N: Tensor) -> Tensor:
    """exp(d) - d - 1, d = reference - current, (N,): the k3 estimate of KL(current || reference), never negative."""
    difference = reference_logprobs_N - logprobs_N
    return torch.exp(difference) - difference - 1


def importance_weights(old_logprobs_N: Tensor, behaviour_logprobs_N: Tensor, cap: float) -> Tensor:
    """min(exp(old - behaviour), cap), detached, (N,); all ones when cap = 0.

    Truncated importance sampling: an unbiased correction where the two policies are close, bounded where they are not.
    """
    if cap == 0:
        return torch.ones_like(old_logprobs_N)
    return torch.exp(old_logprobs_N - behaviour_logprobs_N).clamp(max=cap).detach()


def sequence_weights(lengths_S: Sequence[int], num_sequences: int) -> list[float]:
    """Weight of one token of each sequence, so that a plain sum over tokens is the mean over sequences of token means.

    w_s = 1 / (T_s * S), S = `num_sequences` of the whole optimiser step over all ranks. The loss of a step then does
    not depend on how it is cut into micro-batches.
    """
    return [1.0 / (length * num_sequences) for length in lengths_S]


@dataclass(frozen=True)
class TokenTerms:
    """What the loss is made of, per token, detached, (N,)."""

    surrogate_N: Tensor
    kl_N: Tensor
    ratio_N: Tensor
    clipped_N: Tensor
    importance_N: Tensor


def grpo_loss(
    objective: Objective,
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    behaviour_logprobs_N: Tensor,
    advantages_N: Tensor,
    weights_N: Tensor,
    reference_logprobs_N: Tensor | None,
) -> tuple[Tensor, TokenTerms]:
    """Sum over tokens of w (importance * surrogate + beta * kl), a scalar, and its terms.

    The importance weight multiplies the policy-gradient term only: the KL is a penalty on the current policy.
    Raises ValueError when kl_beta > 0 and there are no reference log-probs.
    """
    if objective.kl_beta > 0 and reference_logprobs_N is None:
        raise ValueError(
            f"kl_beta = {objective.kl_beta}: needs reference log-probs; hold a reference model or set it to 0"
        )
    importance = importance_weights(old_logprobs_N, behaviour_logprobs_N, objective.importance_cap)
    surrogate = importance * clipped_surrogate(logprobs_N, old_logprobs_N, advantages_N, objective.clip_epsilon)
    kl = torch.zeros_like(logprobs_N) if reference_logprobs_N is None else k3_kl(logprobs_N, reference_logprobs_N)
    loss = (weights_N * (surrogate + objective.kl_beta * kl)).sum()
    terms = TokenTerms(
        surrogate_N=surrogate.detach(),
        kl_N=kl.detach(),
        ratio_N=torch.exp(logprobs_N - old_logprobs_N).detach(),
        clipped_N=clipped_tokens(logprobs_N, old_logprobs_N, advantages_N, objective.clip_epsilon).detach(),
        importance_N=importance,
    )
    return loss, terms
