"""Every architecture through the same code: what engine, learner and plain transformers say of the same tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rollout_reference import picture
from transformers import AutoModelForImageTextToText

from sif_ray.config import EngineConfig, LoraConfig, PromptConfig, SamplingConfig
from sif_ray.policy.adapter import add_adapter, merged_weights
from sif_ray.policy.branches import BranchedSequence, branch_logprobs, collate
from sif_ray.policy.check import check_policy
from sif_ray.policy.model import in_vision_tower, load_policy
from sif_ray.policy.processor import PolicyProcessor
from sif_ray.policy.random_policy import write_random_policy
from sif_ray.resources.shapes import PolicyShape, Qwen3VLShape, find_shape
from sif_ray.rollout.engine import RolloutEngine, RolloutRequest
from sif_ray.rollout.weights import make_update

MAX_PIXELS = 96 * 96
QUESTION = "Which is closer?"
PICTURES = (picture(1), picture(2))
SHAPES = {
    "qwen2_5_vl": PolicyShape(128, 3, 4, 2, 192, 700, False, 64, 3, 2, 96),
    "qwen3_vl": Qwen3VLShape(96, 4, 4, 2, 192, 700, False, 64, 4, 2, 96, attention_head=32, positions=64),
}


@pytest.fixture(scope="module", params=SHAPES)
def policy(request, tmp_path_factory) -> tuple[PolicyShape, str]:
    shape = SHAPES[request.param]
    folder = tmp_path_factory.mktemp(request.param) / "policy"
    write_random_policy(shape, folder, tokenizer="toy")
    return shape, str(folder)


def loaded(folder: str, noise: float = 1.0) -> torch.nn.Module:
    """The policy with larger weights: as they are drawn, its answers hardly depend on what it sees."""
    network = load_policy(folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                parameter += noise * 0.1 * torch.randn_like(parameter)
            elif name.endswith("bias"):
                parameter += noise * 0.05 * torch.randn_like(parameter)
    return network


def logprobs(network, processor: PolicyProcessor, prompt_ids, grid, branches) -> list[np.ndarray]:
    """Of the learner, for branches after one prompt."""
    features = processor.image_features(PICTURES)
    sequence = BranchedSequence(prompt_ids, branches, features["pixel_values"], grid)
    batch = collate([sequence], network, processor.pad_token_id)
    with torch.no_grad():
        found, _ = branch_logprobs(network, batch)
    return [part.numpy() for part in found.split([len(branch) for branch in branches])]


def test_random_policies_are_whole_and_of_their_shape(policy):
    shape, folder = policy
    assert check_policy(folder, engine_on_cpu=True) == folder
    assert find_shape(folder)[0] == shape
    network = AutoModelForImageTextToText.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in network.parameters()) == shape.num_parameters
    write_random_policy(shape, Path(folder).parent / "again", tokenizer="toy")
    again = Path(folder).parent / "again" / "model.safetensors"
    assert again.read_bytes() == (Path(folder) / "model.safetensors").read_bytes()


def test_the_learner_agrees_with_transformers(policy):
    _, folder = policy
    processor, network = PolicyProcessor(folder, MAX_PIXELS), loaded(folder)
    encoded = processor.encode_prompt(QUESTION, PICTURES, PromptConfig())
    branches = [processor.encode_completion(text) for text in ("2", "left of the box")]
    found = logprobs(network, processor, encoded.token_ids_P, encoded.image_grid_thw, branches)
    plain = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")  # none of our speed-ups
    plain.load_state_dict(network.state_dict())
    for branch, found_T in zip(branches, found, strict=True):
        ids = torch.tensor([[*encoded.token_ids_P, *branch]])
        with torch.no_grad():
            logits = plain(
                input_ids=ids,
                pixel_values=torch.from_numpy(encoded.pixel_values),
                image_grid_thw=torch.tensor(encoded.image_grid_thw),
                mm_token_type_ids=(ids == processor.image_token_id).int(),
            ).logits[0, -len(branch) - 1 : -1]
        logits[:, processor.image_token_id] = -torch.inf
        expected_T = torch.log_softmax(logits, -1).gather(-1, torch.tensor(branch)[:, None]).squeeze(-1)
        np.testing.assert_allclose(found_T, expected_T.numpy(), atol=1e-4)


def test_adapters_keep_out_of_the_vision_tower_and_its_mergers(policy):
    _, folder = policy
    language, every = load_policy(folder), load_policy(folder)
    add_adapter(language, LoraConfig(rank=2))
    add_adapter(every, LoraConfig(rank=2, targets="all"))
    names = [{weight.name for weight in merged_weights(network) if weight.layer} for network in (language, every)]
    assert names[0] and names[0] == {name for name in names[1] if not in_vision_tower(name)}
    assert any("merger" in name for name in names[1] - names[0])


@pytest.mark.slow
async def test_an_engine_agrees_with_the_learner_before_and_after_an_update(policy):
    _, folder = policy
    processor = PolicyProcessor(folder, MAX_PIXELS)
    config = EngineConfig(max_model_len=512, kv_cache_gib=0.25)
    engine = RolloutEngine(folder, config, PromptConfig(), max_pixels=MAX_PIXELS)
    await engine.start()
    answered = []
    try:
        for version, noise in enumerate((0.0, 1.0)):
            network = loaded(folder, noise)
            if version:
                await engine.update_weights(make_update(version, [list(network.named_parameters())]))
            request = RolloutRequest("test", "test", QUESTION, PICTURES, 3, SamplingConfig(max_tokens=24), seed=3)
            group = await engine.generate(request)
            assert group.newest_version == version
            branches = [rollout.token_ids_T for rollout in group.rollouts]
            expected = logprobs(network, processor, group.prompt_token_ids_P, group.image_grid_thw, branches)
            for rollout, expected_T in zip(group.rollouts, expected, strict=True):
                np.testing.assert_allclose(rollout.logprobs_T, expected_T, atol=1e-3)
            blind = replace(request, images=(PICTURES[1], PICTURES[0]))
            answered.append([rollout.text for rollout in (await engine.generate(blind)).rollouts])
    finally:
        await engine.shutdown()
    assert answered[0] != answered[1]
