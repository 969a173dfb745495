"""Advantages and the GRPO loss against numbers worked out by hand and formulas written out again in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sif_ray.config import ObjectiveConfig
from sif_ray.learner.advantages import group_advantages
from sif_ray.learner.objective import (
    cispo_bounded,
    cispo_surrogate,
    clipped_surrogate,
    clipped_tokens,
    grpo_loss,
    importance_weights,
    k3_kl,
    sequence_log_ratios,
    token_weights,
)

LOG2 = math.log(2.0)


# --- advantages ------------------------------------------------------------------------------------------------------


def test_advantages_divide_by_the_sample_deviation():
    # mean 2, squared deviations 1 + 1 + 1 + 1 = 4, over 3: std = sqrt(4 / 3)
    scale = math.sqrt(4 / 3) + 1e-4
    np.testing.assert_allclose(
        group_advantages([1, 3, 1, 3]), [-1 / scale, 1 / scale, -1 / scale, 1 / scale], rtol=1e-6
    )


def test_advantages_without_deviation_only_centre():
    np.testing.assert_allclose(group_advantages([0.0, 0.5, 4.0], normalise="mean"), [-1.5, -1.0, 2.5], rtol=1e-6)


def test_equal_rewards_give_no_advantage():
    assert group_advantages([0.7] * 8).tolist() == [0.0] * 8


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=16), st.floats(-5, 5))
def test_a_bonus_for_every_rollout_changes_no_advantage(rewards, bonus):
    shifted = group_advantages(np.asarray(rewards) + bonus)
    np.testing.assert_allclose(group_advantages(rewards), shifted, atol=1e-4)


@pytest.mark.parametrize(
    ("rewards", "normalise", "message"),
    [([1.0], "std", "two rollouts"), ([1.0, math.nan], "std", "finite"), ([1.0, 2.0], "max", "'max'")],
)
def test_impossible_advantages_are_refused(rewards, normalise, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, normalise=normalise)


# --- the parts -------------------------------------------------------------------------------------------------------

# ratios 2, 2, 1/2, 1/2 with advantages +1, -1, +1, -1
LOG_RATIOS = torch.tensor([LOG2, LOG2, -LOG2, -LOG2])
ADVANTAGES = torch.tensor([1.0, -1.0, 1.0, -1.0])


def test_surrogate_clips_only_what_moved_too_far_in_the_rewarded_direction():
    found = clipped_surrogate(LOG_RATIOS, ADVANTAGES, low=0.2, high=0.3)
    torch.testing.assert_close(found, torch.tensor([-1.3, 2.0, -0.5, 0.8]))
    low, high = clipped_tokens(LOG_RATIOS, ADVANTAGES, low=0.2, high=0.3)
    assert low.tolist() == [False, False, False, True]
    assert high.tolist() == [True, False, False, False]


def test_clipped_tokens_are_those_without_a_gradient():
    log_ratios = LOG_RATIOS.clone().requires_grad_()
    clipped_surrogate(log_ratios, ADVANTAGES, low=0.2, high=0.3).sum().backward()
    low, high = clipped_tokens(LOG_RATIOS, ADVANTAGES, low=0.2, high=0.3)
    assert (log_ratios.grad == 0).tolist() == (low | high).tolist()


def test_cispo_bounds_the_weight_and_keeps_every_gradient():
    logprobs = torch.tensor([-1.0, -2.0, -3.0, -4.0], requires_grad=True)
    loss = cispo_surrogate(logprobs, logprobs - logprobs.detach() + LOG_RATIOS, ADVANTAGES, low=0.2, high=0.3)
    torch.testing.assert_close(loss.detach(), torch.tensor([1.3, -2.6, 2.4, -3.2]))  # -w A logprob
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-1.3, 1.3, -0.8, 0.8]))  # -w A: w is a constant
    low, high = cispo_bounded(LOG_RATIOS, low=0.2, high=0.3)
    assert low.tolist() == [False, False, True, True]
    assert high.tolist() == [True, True, False, False]
    assert not cispo_bounded(LOG_RATIOS, low=1.0, high=0.3)[0].any()


def test_sequence_ratio_is_the_geometric_mean_of_its_tokens_ratios():
    ratios = torch.tensor([2.0, 3.0, 0.5, 8.0, 2.0])
    found = sequence_log_ratios(ratios.log(), torch.tensor([0, 1, 0, 0, 1]), num_sequences=2).exp()
    first, second = (2.0 * 0.5 * 8.0) ** (1 / 3), (3.0 * 2.0) ** (1 / 2)
    torch.testing.assert_close(found, torch.tensor([first, second, first, first, second]))


def test_k3_of_a_reference_twice_as_likely():
    # d = log 2: 2 - log 2 - 1; equal policies: 0
    kl = k3_kl(torch.tensor([-LOG2, -1.0]), torch.tensor([0.0, -1.0]))
    torch.testing.assert_close(kl, torch.tensor([1 - LOG2, 0.0]))


def test_importance_weight_is_truncated_and_carries_no_gradient():
    log_ratios = torch.tensor([math.log(1.5), math.log(9.0), -LOG2], requires_grad=True)
    weights, truncated = importance_weights(log_ratios, cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([1.5, 2.0, 0.5]))
    assert not weights.requires_grad
    assert truncated.tolist() == [False, True, False]
    weights, truncated = importance_weights(log_ratios, cap=0)
    assert weights.tolist() == [1.0, 1.0, 1.0] and not truncated.any()


def test_token_weights_are_the_means_they_name():
    # 2 sequences of 1 and 4 tokens, of at most 10
    def weights(loss_mean: str) -> list[float]:
        return token_weights(loss_mean, [1, 4], num_sequences=2, num_tokens=5, max_tokens=10)

    assert weights("sequence") == [0.5, 0.125]  # each sequence counts half, whatever its length
    assert weights("token") == [0.2, 0.2]
    assert weights("constant") == [0.05, 0.05]
    with pytest.raises(ValueError, match="'batch'"):
        weights("batch")


# --- the whole loss --------------------------------------------------------------------------------------------------


def test_loss_and_gradient_of_two_sequences_by_hand():
    # Sequence 0: one token, A = +1, engine half as likely (weight 2). Sequence 1: two tokens, A = -1, engine equal.
    # Ratio 1 everywhere. Surrogates -2, +1, +1; kl only where the reference differs: token 2, d = log 2.
    # loss = 1/2 * (-2) + 1/4 * (1 + 1) + 1/4 * 0.1 * (1 - log 2)
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    loss, terms = grpo_loss(
        ObjectiveConfig(kl_beta=0.1, importance_cap=5.0),
        logprobs_N=logprobs,
        proximal_logprobs_N=logprobs.detach(),
        behaviour_logprobs_N=torch.tensor([-1.0 - LOG2, -2.0, -3.0]),
        reference_logprobs_N=torch.tensor([-1.0, -2.0, -3.0 + LOG2]),
        advantages_N=torch.tensor([1.0, -1.0, -1.0]),
        weights_N=torch.tensor([0.5, 0.25, 0.25]),
        sequence_N=torch.tensor([0, 1, 1]),
        num_sequences=2,
    )
    assert loss.item() == pytest.approx(-0.5 + 0.025 * (1 - LOG2))
    assert terms.importance_N.tolist() == pytest.approx([2.0, 1.0, 1.0])
    assert terms.ratio_N.tolist() == [1.0, 1.0, 1.0]
    loss.backward()
    # d(-r A)/d logprob = -A at r = 1; d k3/d logprob = 1 - exp(d) = -1 at token 2
    assert logprobs.grad.tolist() == pytest.approx([0.5 * 2 * -1.0, 0.25, 0.25 * (1.0 - 0.1)])


LENGTHS, SEQUENCE = (3, 1, 6), torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2, 2])
ADVANTAGE_OF, LOW, HIGH, CAP, BETA = (1.3, -0.4, -0.9), 0.2, 0.28, 1.1, 0.04
VARIANTS = [(surrogate, ratio_to) for surrogate in ("clip", "gspo", "cispo") for ratio_to in ("proximal", "behaviour")]


@pytest.fixture
def policies():
    """Log-probs of one micro-batch under the current, proximal, behaviour and reference policy, float64."""
    generator = torch.Generator().manual_seed(5)
    base = -torch.rand(10, generator=generator, dtype=torch.float64) * 3

    def moved() -> torch.Tensor:
        return base + 0.5 * torch.randn(10, generator=generator, dtype=torch.float64)

    return moved(), moved(), moved(), moved()


def slopes_by_hand(surrogate: str, current, old, behaviour, reference) -> list[float]:
    """d loss / d logprob of every token from the gradients the papers state, token by token in plain numbers.

    clip:  -w r A, 0 where clipped              (PPO)
    gspo:  -s A times the mean importance, 0 where the sequence is clipped (arXiv 2507.18071)
    cispo: -w clip(r) A                         (arXiv 2506.13585)
    plus beta (1 - exp(reference - current)), all over T S for the mean of sequences.
    """
    found = []
    start = 0
    for length, advantage in zip(LENGTHS, ADVANTAGE_OF, strict=True):
        tokens = range(start, start + length)
        start += length
        sequence_ratio = math.prod(math.exp(current[t] - old[t]) for t in tokens) ** (1 / length)
        sequence_weight = math.prod(math.exp(old[t] - behaviour[t]) for t in tokens) ** (1 / length)
        for t in tokens:
            ratio = sequence_ratio if surrogate == "gspo" else math.exp(current[t] - old[t])
            weight = min(CAP, sequence_weight if surrogate == "gspo" else math.exp(old[t] - behaviour[t]))
            if surrogate == "cispo":
                slope = -weight * min(max(ratio, 1 - LOW), 1 + HIGH) * advantage
            else:
                outside = ratio > 1 + HIGH if advantage > 0 else ratio < 1 - LOW
                slope = 0.0 if outside else -weight * ratio * advantage
            found.append((slope + BETA * (1 - math.exp(reference[t] - current[t]))) / (length * len(LENGTHS)))
    return found


@pytest.mark.parametrize(("surrogate", "ratio_to"), VARIANTS)
def test_gradient_is_the_one_of_the_paper(policies, surrogate, ratio_to):
    current, proximal, behaviour, reference = policies
    objective = ObjectiveConfig(
        surrogate=surrogate, ratio_to=ratio_to, clip_low=LOW, clip_high=HIGH, importance_cap=CAP, kl_beta=BETA
    )
    weights_S = token_weights("sequence", LENGTHS, num_sequences=3, num_tokens=10, max_tokens=10)
    logprobs = current.clone().requires_grad_()
    loss, terms = grpo_loss(
        objective,
        logprobs_N=logprobs,
        proximal_logprobs_N=proximal,
        behaviour_logprobs_N=behaviour,
        reference_logprobs_N=reference,
        advantages_N=torch.tensor(ADVANTAGE_OF, dtype=torch.float64)[SEQUENCE],
        weights_N=torch.tensor(weights_S, dtype=torch.float64)[SEQUENCE],
        sequence_N=SEQUENCE,
        num_sequences=3,
    )
    loss.backward()
    old = behaviour if ratio_to == "behaviour" else proximal
    expected = slopes_by_hand(surrogate, *(values.tolist() for values in (current, old, behaviour, reference)))
    np.testing.assert_allclose(logprobs.grad.numpy(), expected, rtol=1e-12, atol=1e-14)
    assert (terms.clipped_low_N | terms.clipped_high_N).any()
    if ratio_to == "behaviour":
        assert terms.importance_N.tolist() == [1.0] * 10  # nothing left to correct
    else:
        assert terms.truncated_N.any()


def test_kl_without_a_reference_is_refused():
    zeros, inputs = torch.zeros(1), ("logprobs", "proximal_logprobs", "behaviour_logprobs", "advantages", "weights")
    with pytest.raises(ValueError, match=r"kl_beta = 0\.04"):
        grpo_loss(
            ObjectiveConfig(),
            **{f"{name}_N": zeros for name in inputs},
            reference_logprobs_N=None,
            sequence_N=torch.zeros(1, dtype=torch.long),
            num_sequences=1,
        )
