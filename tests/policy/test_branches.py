"""Packed branches give the log-probs of separate sequences, computed by transformers alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, Qwen2_5_VLForConditionalGeneration

from sif_ray.config import PromptConfig
from sif_ray.policy.branches import BranchedSequence, branch_logprobs, collate
from sif_ray.policy.model import load_policy, save_policy
from sif_ray.policy.processor import PolicyProcessor
from sif_ray.policy.tiled_attention import FLOAT32_ATTENTION, _cut
from sif_ray.toyworld.assets import path
from sif_ray.toyworld.render import png, render
from sif_ray.toyworld.scenes import make_scene

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def folder() -> str:
    return str(path("tiny_policy"))


@pytest.fixture(scope="module")
def prompts(folder):
    processor = PolicyProcessor(folder)
    questions = ["How many balls are there?", "Is the red ball left or right of the blue box?"]
    images = [png(render(make_scene(seed)).rgb) for seed in range(4)]
    encoded = [processor.encode_prompt(q, images[2 * i : 2 * i + 2], PromptConfig()) for i, q in enumerate(questions)]
    return processor, encoded


def test_branch_logprobs_equal_those_of_separate_sequences(folder, prompts):
    processor, encoded = prompts
    completions = [["2", "Look at the whole image."], ["left", "right of the box", "0.12,0.30,0.45,0.60"]]
    sequences = [
        BranchedSequence(
            p.token_ids_P, [processor.encode_completion(c) for c in texts], p.pixel_values, p.image_grid_thw
        )
        for p, texts in zip(encoded, completions, strict=True)
    ]
    policy = load_policy(folder)
    batch = collate(sequences, policy, processor.pad_token_id)
    with torch.no_grad():
        logprobs, entropies = branch_logprobs(policy, batch, TEMPERATURE)
    reference = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)  # none of our speed-ups
    expected = [_separately(reference, s, branch) for s in sequences for branch in s.branches]
    got = [logprobs[batch.branch_M == k] for k in range(batch.num_branches)]
    for ours, (theirs, _) in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    torch.testing.assert_close(entropies, torch.cat([entropy for _, entropy in expected]), atol=1e-4, rtol=0)


def _separately(policy, sequence, branch):
    ids = torch.tensor([[*sequence.prefix_ids, *branch]])
    with torch.no_grad():
        logits = policy(
            input_ids=ids,
            pixel_values=torch.from_numpy(sequence.pixel_values),
            image_grid_thw=torch.tensor(sequence.image_grid_thw),
            mm_token_type_ids=(ids == policy.config.image_token_id).int(),
        ).logits[0, len(sequence.prefix_ids) - 1 : -1]
    logits[:, policy.config.image_token_id] = -torch.inf
    logprobs = torch.log_softmax(logits / TEMPERATURE, -1)
    return logprobs.gather(-1, torch.tensor(branch)[:, None]).squeeze(-1), -(logprobs.exp() * logprobs).nansum(-1)


def test_a_loss_mask_selects_the_tokens_to_predict(folder, prompts):
    processor, (prompt, _) = prompts
    branch = processor.encode_completion("2 balls")
    mask = [False] * (len(branch) - 2) + [True, True]
    sequence = BranchedSequence(prompt.token_ids_P, [branch], prompt.pixel_values, prompt.image_grid_thw)
    masked = BranchedSequence(prompt.token_ids_P, [branch], prompt.pixel_values, prompt.image_grid_thw, [mask])
    policy = load_policy(folder)
    with torch.no_grad():
        every, _ = branch_logprobs(policy, collate([sequence], policy, processor.pad_token_id))
        some, _ = branch_logprobs(policy, collate([masked], policy, processor.pad_token_id))
    torch.testing.assert_close(every[-2:], some)


def test_a_saved_policy_is_complete_and_loads_to_the_same_weights(folder, tmp_path):
    policy = load_policy(folder)
    with torch.no_grad():
        policy.lm_head.weight.add_(1.0)
    save_policy(policy, folder, str(tmp_path / "out"))
    loaded = load_policy(str(tmp_path / "out"))
    for (name, ours), (other, theirs) in zip(policy.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        np.testing.assert_array_equal(ours.detach().numpy(), theirs.detach().numpy())
    PolicyProcessor(str(tmp_path / "out"))
    assert not (tmp_path / "out.unfinished").exists()


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_attention_in_tiles_equals_attention_under_the_whole_mask(heads):
    torch.manual_seed(0)
    segments = torch.tensor([[0] * 5 + [1] * 7 + [2] + [3] * 4, [0] * 9 + [1] * 4 + [-1] * 4])  # -1 = padding
    mask = torch.ones(17, 17, dtype=torch.bool).tril()
    mask = (mask & ((segments[:, :, None] == segments[:, None]) | (segments[:, None] == 0)))[:, None]
    query, key, value = (torch.randn(2, count, 17, 8, requires_grad=True) for count in (heads[0], heads[1], heads[1]))
    attend = AttentionInterface()[FLOAT32_ATTENTION]
    tiled, _ = attend(nn.Module(), query, key, value, mask, scaling=0.3)
    repeated = [states.repeat_interleave(heads[0] // heads[1], 1) for states in (key, value)]
    whole = functional.scaled_dot_product_attention(query, *repeated, mask, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(tiled, whole)
    weights = torch.randn_like(whole)
    for ours, theirs in zip(
        *(torch.autograd.grad((found * weights).sum(), (query, key, value)) for found in (tiled, whole)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_tiles_leave_out_the_branches_that_a_branch_does_not_see():
    segments = torch.tensor([0] * 57 + [branch for branch in range(1, 9) for _ in range(96)])
    mask = torch.ones(len(segments), len(segments), dtype=torch.bool).tril()
    mask &= (segments[:, None] == segments) | (segments == 0)
    computed = sum(tile.mask.numel() for tile in _cut(mask).tiles)
    assert int(mask.sum()) == sum(int(tile.mask.sum()) for tile in _cut(mask).tiles)
    assert computed == 57 * 57 + 8 * 96 * (57 + 96)  # of 825 * 825
