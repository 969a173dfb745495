"""What is particular to each architecture of policy: its configuration, its processor, what its sizes share.

Everything else (prompts, positions, packing, LoRA, weight updates) works on either through the interface of
transformers: `model.visual`, `model.language_model`, `lm_head`, `get_rope_index`, `image_grid_thw`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, Qwen2_5_VLConfig, Qwen3VLConfig

from sif_ray.resources.shapes import PolicyShape, Qwen3VLShape

Settings = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """One family of policies, as transformers names its parts."""

    config: type[PreTrainedConfig]
    settings: Callable[[Any], tuple[Settings, Settings]]  # shape to the blocks text_config and vision_config
    processor: str
    video_processor: str
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    image_pixels: tuple[int, int]  # smallest and largest image of the published processor
    chat_template: str  # its file among the templates that the package trl ships


def _qwen2_5_settings(shape: PolicyShape) -> tuple[Settings, Settings]:
    pair = 3 * shape.head_dim // 16  # of a head's dim / 2 frequencies: 16 for time, 24 for height and width at 128
    section = [shape.head_dim // 2 - 2 * pair, pair, pair]
    text = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}}
    everywhere = list(range(7, shape.vision_layers, 8)) or [shape.vision_layers - 1]  # blocks with full attention
    return text, {"window_size": 112, "fullatt_block_indexes": everywhere, "tokens_per_second": 2}


def _qwen3_settings(shape: Qwen3VLShape) -> tuple[Settings, Settings]:
    pair = 5 * shape.head_dim // 32
    section = [shape.head_dim // 2 - 2 * pair, pair, pair]
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": section, "mrope_interleaved": True}
    apart = max(1, (shape.vision_layers + 1) // (shape.deepstack + 1))  # blocks 5, 11, 17 of 24
    read = [apart * (number + 1) - 1 for number in range(shape.deepstack)]
    if shape.vision_layers == 27:
        read = [8, 16, 24]  # as published
    vision = {"num_position_embeddings": shape.positions, "deepstack_visual_indexes": read}
    return {"head_dim": shape.head_dim, "rope_parameters": rope}, vision


ARCHITECTURES = {
    "qwen2_5_vl": Architecture(
        config=Qwen2_5_VLConfig,
        settings=_qwen2_5_settings,
        processor="Qwen2_5_VLProcessor",
        video_processor="Qwen2VLVideoProcessor",
        image_mean=(0.48145466, 0.4578275, 0.40821073),
        image_std=(0.26862954, 0.26130258, 0.27577711),
        image_pixels=(56 * 56, 28 * 28 * 16384),
        chat_template="qwen2_5_vl.jinja",
    ),
    "qwen3_vl": Architecture(
        config=Qwen3VLConfig,
        settings=_qwen3_settings,
        processor="Qwen3VLProcessor",
        video_processor="Qwen3VLVideoProcessor",
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        image_pixels=(256 * 256, 4096 * 4096),
        chat_template="qwen3_vl.jinja",
    ),
}
"""By the `model_type` in `config.json`; the keys are those of `sif_ray.resources.shapes.SHAPES`."""


def make_config(shape: PolicyShape, token_ids: dict[str, int]) -> PreTrainedConfig:
    """The configuration of a policy in this shape.

    `token_ids`: eos_token_id, pad_token_id, and image_token_id, video_token_id, vision_start_token_id and
    vision_end_token_id.
    """
    architecture = ARCHITECTURES[shape.model_type]
    text, vision = architecture.settings(shape)
    of_text = ("eos_token_id", "pad_token_id")
    return architecture.config(
        text_config={
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.mlp,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "bos_token_id": None,
            "tie_word_embeddings": shape.tied,
            **{name: token_ids[name] for name in of_text},
            **text,
        },
        vision_config={
            "depth": shape.vision_layers,
            "hidden_size": shape.vision_hidden,
            "intermediate_size": shape.vision_mlp,
            "num_heads": shape.vision_heads,
            "out_hidden_size": shape.hidden,
            "patch_size": shape.patch_px,
            "spatial_merge_size": shape.merge,
            **vision,
        },
        tie_word_embeddings=shape.tied,
        **{name: number for name, number in token_ids.items() if name not in of_text},
    )
