"""Real models of a given shape."""

from __future__ import annotations

from transformers import Qwen2_5_VLConfig

from sif_ray.resources.shapes import PolicyShape


def hf_config(shape: PolicyShape) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": shape.hidden,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "intermediate_size": shape.mlp,
            "vocab_size": shape.vocabulary,
            "bos_token_id": None,
            "eos_token_id": 2,
        },
        vision_config={
            "depth": shape.vision_layers,
            "hidden_size": shape.vision_hidden,
            "intermediate_size": shape.vision_mlp,
            "num_heads": shape.vision_heads,
            "out_hidden_size": shape.hidden,
            "patch_size": shape.patch_px,
            "spatial_merge_size": shape.merge,
            "fullatt_block_indexes": [0],
        },
        tie_word_embeddings=shape.tied,
        image_token_id=5,
    )
