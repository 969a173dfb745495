"""LoRA on the tiny policy against peft's own model, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace

import peft
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from sif_ray.config import ConfigError, LoraConfig, PromptConfig
from sif_ray.policy.adapter import (
    REFERENCE,
    TRAINED,
    add_adapter,
    load_adapter,
    merged_weights,
    starting_adapter,
    with_adapter,
)
from sif_ray.policy.branches import BranchedSequence, branch_logprobs, collate
from sif_ray.policy.model import freeze_vision, load_policy
from sif_ray.policy.processor import PolicyProcessor
from sif_ray.toyworld.assets import path
from sif_ray.toyworld.render import png, render
from sif_ray.toyworld.scenes import make_scene

LORA = LoraConfig(rank=4, alpha=12.0, targets="all")
FOLDER = str(path("tiny_policy"))


def adapted(config: LoraConfig = LORA):
    """A policy whose adapter does something."""
    policy = load_policy(FOLDER)
    add_adapter(policy, config)
    torch.manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return policy


@pytest.fixture(scope="module")
def batch():
    processor = PolicyProcessor(FOLDER)
    images = [png(render(make_scene(seed)).rgb) for seed in range(2)]
    prompt = processor.encode_prompt("How many balls are there?", images, PromptConfig())
    branches = [processor.encode_completion(text) for text in ("2", "three of them")]
    sequence = BranchedSequence(prompt.token_ids_P, branches, prompt.pixel_values, prompt.image_grid_thw)
    return collate([sequence], load_policy(FOLDER), processor.pad_token_id)


def peft_merged(policy) -> dict[str, torch.Tensor]:
    """What peft makes of the same adapter on a fresh policy of transformers' own."""
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32)
    names = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)]
    settings = peft.LoraConfig(r=4, lora_alpha=12, target_modules=names)
    model = peft.get_peft_model(base, settings)
    adapter = {f"base_model.model.{name}": value for name, value in policy.state_dict().items() if "lora_" in name}
    missing = model.load_state_dict(adapter, strict=False)
    assert not missing.unexpected_keys
    assert not [name for name in missing.missing_keys if "lora_" in name]
    return dict(model.merge_and_unload().named_parameters())


def test_merged_weights_are_those_of_pefts_own_merge_and_leave_the_policy_alone(batch):
    policy = adapted()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    expected = peft_merged(policy)
    found = {weight.name: weight.value() for weight in merged_weights(policy)}
    start = dict(load_policy(FOLDER).named_parameters())
    assert list(found) == list(expected) == list(start)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=0, rtol=0, msg=name)
    assert sum(not torch.equal(found[name], start[name]) for name in found) > 40
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    plain = load_policy(FOLDER)
    plain.load_state_dict(found)
    with torch.no_grad():
        torch.testing.assert_close(branch_logprobs(plain, batch), branch_logprobs(policy, batch), atol=2e-5, rtol=0)


def test_the_policy_without_its_adapter_is_the_one_it_began_with(batch):
    policy = adapted()
    trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    with torch.no_grad():
        on = branch_logprobs(policy, batch)[0]
        with with_adapter(policy, REFERENCE):
            off = branch_logprobs(policy, batch)[0]
        start = branch_logprobs(load_policy(FOLDER), batch)[0]
        again = branch_logprobs(policy, batch)[0]
    assert torch.equal(off, start)
    assert torch.equal(again, on)
    assert (on - start).abs().max() > 0.01
    assert trained == [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


@pytest.fixture
def peft_folder(tmp_path) -> str:
    """An adapter that peft itself has made for some layers of the tiny policy, and written."""
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], base_model_name_or_path="toy")
    model = peft.get_peft_model(base, settings)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def test_two_adapters_lie_side_by_side_and_are_switched(batch, peft_folder):
    stored = starting_adapter(LoraConfig(rank=4, adapter=peft_folder), FOLDER)
    policy = load_policy(FOLDER)
    load_adapter(policy, stored, 0.0, TRAINED)
    load_adapter(policy, stored, 0.0, REFERENCE)
    trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    assert trained and all(f".{TRAINED}." in name for name in trained)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if f"lora_B.{TRAINED}" in name:
                parameter.mul_(3.0)
        changed = branch_logprobs(policy, batch)[0]
        with with_adapter(policy, REFERENCE):
            start = branch_logprobs(policy, batch)[0]
        again = branch_logprobs(policy, batch)[0]
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32)
        by_peft = peft.PeftModel.from_pretrained(model, peft_folder).merge_and_unload()
        expected = branch_logprobs(by_peft, batch)[0]
    torch.testing.assert_close(start, expected, atol=2e-5, rtol=0)
    assert (changed - start).abs().max() > 0.01
    assert torch.equal(changed, again)
    assert trained == [name for name, parameter in policy.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        (LoraConfig(rank=8), r"has rank 4 and alpha 8 .* learner.lora.rank = 8 .* set them to the adapter's"),
        (LoraConfig(rank=4, alpha=4.0), r"has rank 4 and alpha 8 .* alpha = 4"),
    ],
)
def test_an_adapter_of_another_rank_or_scale_is_refused(peft_folder, lora, told):
    with pytest.raises(ConfigError, match=told):
        starting_adapter(replace(lora, adapter=peft_folder), FOLDER)


def test_targets_choose_linear_layers_in_and_outside_the_vision_tower():
    def adapted_layers(config):
        names = [weight.name for weight in merged_weights(adapted(config)) if weight.layer is not None]
        return [name for name in names if name.startswith("model.visual.")], names

    vision, language = adapted_layers(LoraConfig(rank=4))
    assert not vision
    assert len(language) == 4 * 7 + 1  # q, k, v, o, gate, up and down of 4 layers, and the output layer
    assert "lm_head.weight" in language
    vision, every = adapted_layers(LORA)
    assert set(every) - set(vision) == set(language)
    depth = load_policy(FOLDER).config.vision_config.depth
    assert len(vision) == depth * 5 + 2  # qkv, proj, gate, up and down of a block, and the merger's two


def test_an_output_layer_that_is_tied_to_the_embeddings_has_no_adapter():
    policy = load_policy(FOLDER)
    policy.lm_head.weight = policy.get_input_embeddings().weight
    add_adapter(policy, LoraConfig(rank=4))
    names = [weight.name for weight in merged_weights(policy)]
    assert "lm_head.weight" not in names
    assert "model.language_model.embed_tokens.weight" in names


def test_every_rank_begins_with_the_same_adapter_and_other_random_numbers_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first, second = load_policy(FOLDER), load_policy(FOLDER)
    add_adapter(first, LORA)
    assert torch.equal(torch.rand(2), expected)
    add_adapter(second, LORA)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_a_frozen_vision_tower_keeps_every_one_of_its_weights():
    policy = load_policy(FOLDER)
    freeze_vision(policy)
    frozen = {id(parameter) for parameter in policy.parameters() if not parameter.requires_grad}
    assert frozen == {id(parameter) for parameter in policy.model.visual.parameters()}
