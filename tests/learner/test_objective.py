"""Advantages and the GRPO loss against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sif_ray.learner.advantages import group_advantages
from sif_ray.learner.objective import (
    Objective,
    clipped_surrogate,
    clipped_tokens,
    grpo_loss,
    importance_weights,
    k3_kl,
    sequence_weights,
)

LOG2 = math.log(2.0)


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


def test_surrogate_clips_only_what_moved_too_far_in_the_rewarded_direction():
    # ratios 2, 2, 1/2, 1/2 with advantages +1, -1, +1, -1 and epsilon 0.2
    logprobs = torch.tensor([LOG2, LOG2, -LOG2, -LOG2])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    old = torch.zeros(4)
    torch.testing.assert_close(clipped_surrogate(logprobs, old, advantages, 0.2), torch.tensor([-1.2, 2.0, -0.5, 0.8]))
    assert clipped_tokens(logprobs, old, advantages, 0.2).tolist() == [True, False, False, True]


def test_k3_of_a_reference_twice_as_likely():
    # d = log 2: 2 - log 2 - 1; equal policies: 0
    kl = k3_kl(torch.tensor([-LOG2, -1.0]), torch.tensor([0.0, -1.0]))
    torch.testing.assert_close(kl, torch.tensor([1 - LOG2, 0.0]))


def test_importance_weight_is_truncated_and_carries_no_gradient():
    old = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    behaviour = torch.tensor([-1.0 - math.log(1.5), -1.0 - math.log(9.0), -1.0 + LOG2])
    weights = importance_weights(old, behaviour, cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([1.5, 2.0, 0.5]))
    assert not weights.requires_grad
    assert importance_weights(old, behaviour, cap=0).tolist() == [1.0, 1.0, 1.0]


def test_token_weights_mean_over_tokens_then_over_sequences():
    # 2 sequences of 1 and 4 tokens: each counts half, whatever its length
    assert sequence_weights([1, 4], num_sequences=2) == [0.5, 0.125]


def test_loss_and_gradient_of_two_sequences_by_hand():
    # Sequence 0: one token, A = +1, engine half as likely (weight 2). Sequence 1: two tokens, A = -1, engine equal.
    # Ratio 1 everywhere. Surrogates -2, +1, +1; kl only where the reference differs: token 2, d = log 2.
    # loss = 1/2 * (-2) + 1/4 * (1 + 1) + 1/4 * 0.1 * (1 - log 2)
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    loss, terms = grpo_loss(
        Objective(clip_epsilon=0.2, kl_beta=0.1, importance_cap=5.0),
        logprobs,
        logprobs.detach(),
        behaviour_logprobs_N=torch.tensor([-1.0 - LOG2, -2.0, -3.0]),
        advantages_N=torch.tensor([1.0, -1.0, -1.0]),
        weights_N=torch.tensor([0.5, 0.25, 0.25]),
        reference_logprobs_N=torch.tensor([-1.0, -2.0, -3.0 + LOG2]),
    )
    assert loss.item() == pytest.approx(-0.5 + 0.025 * (1 - LOG2))
    assert terms.importance_N.tolist() == pytest.approx([2.0, 1.0, 1.0])
    assert terms.ratio_N.tolist() == [1.0, 1.0, 1.0]
    loss.backward()
    # d(-r A)/d logprob = -A at r = 1; d k3/d logprob = 1 - exp(d) = -1 at token 2
    assert logprobs.grad.tolist() == pytest.approx([0.5 * 2 * -1.0, 0.25, 0.25 * (1.0 - 0.1)])


def test_kl_without_a_reference_is_refused():
    zeros = torch.zeros(1)
    with pytest.raises(ValueError, match=r"kl_beta = 0\.04"):
        grpo_loss(Objective(), zeros, zeros, zeros, zeros, zeros, None)
