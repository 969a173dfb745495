"""The GRPO objective as pure functions on flat tensors over the N trained tokens of a micro-batch.

Three policies appear. The *current* one carries the gradient. The *proximal* one is the policy before the first update
on a batch; the ratio that is clipped is current / proximal. With one update per batch it is the current policy itself,
detached, so the ratio is 1 and clipping is idle, exactly as in the released code (num_iterations = 1). The *behaviour*
policy is what the engine sampled from: it differs from the proximal one by numerics and by staleness, and a truncated
importance weight proximal / behaviour corrects for both (decoupled PPO). With `ratio_to` = "behaviour" the ratio is
current / behaviour and there is nothing left to correct.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sif_ray.config import ObjectiveConfig


def clipped_surrogate(log_ratios_N: Tensor, advantages_N: Tensor, low: float, high: float) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A), (N,) (PPO, arXiv 1707.06347, eq. 7).

    high > low leaves unlikely tokens more room to rise (DAPO, arXiv 2503.14476, section 3.1).
    """
    ratios = torch.exp(log_ratios_N)
    return -torch.minimum(ratios * advantages_N, ratios.clamp(1 - low, 1 + high) * advantages_N)


def clipped_tokens(log_ratios_N: Tensor, advantages_N: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Whether `clipped_surrogate` takes a token's gradient away, at the lower and the upper bound, each bool (N,)."""
    ratios = torch.exp(log_ratios_N)
    return (ratios < 1 - low) & (advantages_N < 0), (ratios > 1 + high) & (advantages_N > 0)


def cispo_surrogate(logprobs_N: Tensor, log_ratios_N: Tensor, advantages_N: Tensor, low: float, high: float) -> Tensor:
    """-sg(clip(r, 1 - low, 1 + high)) A logprob, (N,) (CISPO, MiniMax-M1, arXiv 2506.13585).

    sg stops the gradient: the ratio is a bounded weight, and no token loses its gradient.
    """
    return -torch.exp(log_ratios_N).clamp(1 - low, 1 + high).detach() * advantages_N * logprobs_N


def cispo_bounded(log_ratios_N: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Whether `cispo_surrogate` bounds a token's weight, from below and from above, each bool (N,)."""
    ratios = torch.exp(log_ratios_N)
    return ratios < 1 - low, ratios > 1 + high


def sequence_log_ratios(log_ratios_N: Tensor, sequence_N: Tensor, num_sequences: int) -> Tensor:
    """Every token's log-ratio replaced by the mean of its sequence, (N,); `sequence_N` numbers the sequences from 0.

    Its exponential is the length-normalised ratio of whole sequences (GSPO, arXiv 2507.18071).
    """
    sums_S = log_ratios_N.new_zeros(num_sequences).index_add(0, sequence_N, log_ratios_N)
    lengths_S = torch.bincount(sequence_N, minlength=num_sequences)
    return (sums_S / lengths_S)[sequence_N]


def importance_weights(log_ratios_N: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """min(exp(log-ratio of proximal to behaviour), cap), detached, and whether the cap acts (bool), each (N,).

    cap = 0: no correction, all ones.

    Truncated importance sampling: an unbiased correction where the two policies are close, bounded where they are not.
    Next to a ratio against the proximal policy this is decoupled PPO (AReaL, arXiv 2505.24298).
    """
    if cap == 0:
        return torch.ones_like(log_ratios_N), torch.zeros_like(log_ratios_N, dtype=torch.bool)
    ratios = torch.exp(log_ratios_N).detach()
    return ratios.clamp(max=cap), ratios > cap


def k3_kl(logprobs_N: Tensor, reference_logprobs_N: Tensor) -> Tensor:
    """exp(d) - d - 1, d = reference - current, (N,): the k3 estimate of KL(current || reference), never negative."""
    difference = reference_logprobs_N - logprobs_N
    return torch.exp(difference) - difference - 1


def token_weights(
    loss_mean: str, lengths_S: Sequence[int], *, num_sequences: int, num_tokens: int, max_tokens: int
) -> list[float]:
    """Weight of one token of each sequence, so that a plain sum over tokens is the mean that `loss_mean` names.

    "sequence": 1 / (S T_s), the mean over sequences of their token means (GRPO, arXiv 2402.03300, eq. 3).
    "token":    1 / N, the mean over all tokens (DAPO, arXiv 2503.14476, section 3.3).
    "constant": 1 / (S max_tokens), no weight for short or long sequences (Dr. GRPO, arXiv 2503.20783).

    S = `num_sequences` and N = `num_tokens` are those of the whole update over all ranks. The loss then does not depend
    on how an update is cut into micro-batches. Raises ValueError for an unknown `loss_mean`.
    """
    if loss_mean == "sequence":
        return [1.0 / (num_sequences * length) for length in lengths_S]
    if loss_mean == "token":
        return [1.0 / num_tokens for _ in lengths_S]
    if loss_mean == "constant":
        return [1.0 / (num_sequences * max_tokens) for _ in lengths_S]
    raise ValueError(f"loss_mean = {loss_mean!r}: must be 'sequence', 'token' or 'constant'")


@dataclass(frozen=True)
class TokenTerms:
    """What the loss is made of, per token, detached, (N,)."""

    kl_N: Tensor
    ratio_N: Tensor
    clipped_low_N: Tensor  # bool
    clipped_high_N: Tensor  # bool
    importance_N: Tensor
    truncated_N: Tensor  # bool, the importance weight is at its cap


def grpo_loss(
    objective: ObjectiveConfig,
    *,
    logprobs_N: Tensor,
    proximal_logprobs_N: Tensor,
    behaviour_logprobs_N: Tensor,
    reference_logprobs_N: Tensor | None,
    advantages_N: Tensor,
    weights_N: Tensor,
    sequence_N: Tensor,
    num_sequences: int,
) -> tuple[Tensor, TokenTerms]:
    """Sum over tokens of w (importance * surrogate + beta * kl), a scalar, and its terms.

    `sequence_N` says which of the `num_sequences` completions of the micro-batch a token belongs to; each is there as a
    whole. The importance weight multiplies the policy-gradient term only: the KL is a penalty on the current policy.
    GSPO takes both ratios of whole sequences. Raises ValueError when kl_beta > 0 and there are no reference log-probs.
    """
    if objective.kl_beta > 0 and reference_logprobs_N is None:
        raise ValueError(
            f"objective.kl_beta = {objective.kl_beta}: needs reference log-probs; hold a reference model or set it to 0"
        )
    old_N = behaviour_logprobs_N if objective.ratio_to == "behaviour" else proximal_logprobs_N
    log_ratios_N, log_importance_N = logprobs_N - old_N, old_N - behaviour_logprobs_N
    if objective.surrogate == "gspo":
        log_ratios_N = sequence_log_ratios(log_ratios_N, sequence_N, num_sequences)
        log_importance_N = sequence_log_ratios(log_importance_N, sequence_N, num_sequences)
    bounds = (objective.clip_low, objective.clip_high)
    if objective.surrogate == "cispo":
        surrogate_N = cispo_surrogate(logprobs_N, log_ratios_N, advantages_N, *bounds)
        clipped_low_N, clipped_high_N = cispo_bounded(log_ratios_N, *bounds)
    else:
        surrogate_N = clipped_surrogate(log_ratios_N, advantages_N, *bounds)
        clipped_low_N, clipped_high_N = clipped_tokens(log_ratios_N, advantages_N, *bounds)
    importance_N, truncated_N = importance_weights(log_importance_N, objective.importance_cap)
    kl_N = torch.zeros_like(logprobs_N) if reference_logprobs_N is None else k3_kl(logprobs_N, reference_logprobs_N)
    loss = (weights_N * (importance_N * surrogate_N + objective.kl_beta * kl_N)).sum()
    terms = TokenTerms(
        kl_N=kl_N.detach(),
        ratio_N=torch.exp(log_ratios_N).detach(),
        clipped_low_N=clipped_low_N,
        clipped_high_N=clipped_high_N,
        importance_N=importance_N,
        truncated_N=truncated_N,
    )
    return loss, terms
