"""Sizes are those of the real architecture, built without memory, and of the published checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from resource_models import hf_config
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration

from sif_ray.resources.shapes import KNOWN, PolicyShape, find_shape, shape_of

# Bytes of the published bfloat16 checkpoints, `metadata.total_size` of their `model.safetensors.index.json`, halved.
PUBLISHED_PARAMETERS = {
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen2.5-vl-32b": 33_452_718_336,
    "qwen2.5-vl-72b": 73_410_777_344,
    "qwen3-vl-2b": 2_127_532_032,
    "qwen3-vl-4b": 4_437_815_808,
    "qwen3-vl-8b": 8_767_123_696,
    "qwen3-vl-32b": 33_357_390_064,
}


def built(shape: PolicyShape) -> torch.nn.Module:
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(hf_config(shape))
    model.tie_weights()
    return model


@pytest.mark.parametrize("name", KNOWN)
def test_the_published_shapes_have_the_published_size(name):
    assert KNOWN[name].num_parameters == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize(
    "shape",
    [
        KNOWN["qwen2.5-vl-3b"],
        PolicyShape(64, 3, 4, 2, 96, 320, False, 48, 2, 3, 80),
        PolicyShape(96, 2, 3, 3, 112, 100, True, 32, 1, 2, 64, patch_px=16, merge=3),
    ],
    ids=["3b", "small", "odd"],
)
def test_counts_are_those_of_the_model_that_transformers_builds(shape):
    model = built(shape)
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.vision_parameters == sum(parameter.numel() for parameter in model.model.visual.parameters())
    assert shape_of(model.config.to_dict()) == shape


def test_the_toy_is_read_from_its_own_folder():
    shape, source = find_shape("toy")
    from sif_ray.toyworld import assets

    model = AutoModelForImageTextToText.from_pretrained(assets.path("tiny_policy"))
    assert shape is not None and shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert source == "config.json of toy"


def test_a_folder_speaks_for_itself_whatever_its_name(tmp_path):
    folder = tmp_path / "qwen2.5-vl-72b"
    folder.mkdir()
    flat = {
        "model_type": "qwen2_5_vl", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 320, "tie_word_embeddings": False,
        "vision_config": {
            "depth": 2, "hidden_size": 48, "intermediate_size": 80, "num_heads": 3, "patch_size": 14,
            "spatial_merge_size": 2,
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(flat))  # text settings at the top, as in the published files
    assert find_shape(str(folder))[0] == PolicyShape(64, 3, 4, 2, 96, 320, False, 48, 2, 3, 80)
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))
    shape, source = find_shape(str(folder))
    assert shape is None and "none of qwen2_5_vl" in source


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", "qwen2.5-vl-7b"),
        ("runs/qwen2.5-vl-3b/warmup/checkpoint", "qwen2.5-vl-3b"),
        ("runs/warmup/checkpoint", None),
    ],
)
def test_a_name_is_enough_where_nothing_is_here(policy, name):
    shape, source = find_shape(policy)
    assert shape == (KNOWN[name] if name else None)
    assert (name or "not here") in source
