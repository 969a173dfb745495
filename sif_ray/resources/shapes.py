"""The size of a policy from a few numbers of its configuration, without loading it. No torch.

Numbers count for the architecture Qwen2.5-VL (arXiv 2502.13923): a vision tower of gated transformer blocks, a merger
of 2 x 2 patches, and a language model with grouped-query attention.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sif_ray.toyworld import assets

MODEL_TYPE = "qwen2_5_vl"


@dataclass(frozen=True)
class PolicyShape:
    """Widths and depths of a Qwen2.5-VL.

    Example: `KNOWN["qwen2.5-vl-7b"].num_parameters == 8_292_166_656`.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    tied: bool  # the output embedding is the input embedding
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    patch_px: int = 14
    merge: int = 2  # merge x merge patches become one token

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def px_per_token(self) -> int:
        """Pixels of an image behind one of its tokens."""
        return (self.patch_px * self.merge) ** 2

    @property
    def language_linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one block of the language model."""
        kv = self.kv_heads * self.head_dim
        attention = [(self.hidden, self.hidden), (self.hidden, kv), (self.hidden, kv), (self.hidden, self.hidden)]
        return [*attention, (self.hidden, self.mlp), (self.hidden, self.mlp), (self.mlp, self.hidden)]

    @property
    def vision_linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one block of the vision tower."""
        width, mlp = self.vision_hidden, self.vision_mlp
        return [(width, 3 * width), (width, width), (width, mlp), (width, mlp), (mlp, width)]

    @property
    def merger_linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the merger's linear layers."""
        merged = self.vision_hidden * self.merge**2
        return [(merged, merged), (merged, self.hidden)]

    @property
    def vision_parameters(self) -> int:
        """Parameters of the vision tower and its merger."""
        width = self.vision_hidden
        block = sum((inputs + 1) * outputs for inputs, outputs in self.vision_linears) + 2 * width
        merger = sum((inputs + 1) * outputs for inputs, outputs in self.merger_linears) + width
        return 3 * 2 * self.patch_px**2 * width + self.vision_layers * block + merger

    @property
    def language_parameters(self) -> int:
        """Parameters of the language model, tied embeddings counted once."""
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim  # of query, key and value
        block = sum(inputs * outputs for inputs, outputs in self.language_linears) + biases + 2 * self.hidden
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * block + self.hidden

    @property
    def num_parameters(self) -> int:
        return self.vision_parameters + self.language_parameters


def _published(
    hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, vocabulary: int, tied: bool, vision_mlp: int
) -> PolicyShape:
    return PolicyShape(hidden, layers, heads, kv_heads, mlp, vocabulary, tied, 1280, 32, 16, vision_mlp)


KNOWN = {
    "qwen2.5-vl-3b": _published(2048, 36, 16, 2, 11008, 151936, True, 3420),
    "qwen2.5-vl-7b": _published(3584, 28, 28, 4, 18944, 152064, False, 3420),
    "qwen2.5-vl-32b": _published(5120, 64, 40, 8, 27648, 152064, False, 3456),
    "qwen2.5-vl-72b": _published(8192, 80, 64, 8, 29568, 152064, False, 3456),
}
"""Shapes of the published checkpoints, from their `config.json`."""


def find_shape(policy: str) -> tuple[PolicyShape | None, str]:
    """The shape of a policy ("toy", a folder, a hub id, or a folder that is still to be written) and where it is from.

    A folder's `config.json` is read; a name that holds one of `KNOWN`, such as `runs/qwen2.5-vl-7b/checkpoint`, is
    taken to have that shape. Nothing is looked up on a hub. (None, why) for anything else.
    """
    folder = assets.path("tiny_policy") if policy == "toy" else Path(policy)
    file = folder / "config.json"
    if file.is_file():
        shape = shape_of(json.loads(file.read_text(encoding="utf-8")))
        return shape, f"config.json of {policy}" + ("" if shape else f", which is no {MODEL_TYPE}")
    for name, shape in KNOWN.items():
        if name in policy.lower():
            return shape, f"{name}, by the policy's name"
    return None, f"{policy} is not here, and its name holds none of {', '.join(KNOWN)}"


def shape_of(config: Mapping[str, Any]) -> PolicyShape | None:
    """The shape in a checkpoint's `config.json`, whose text settings stand in a block or, of old, at the top.

    None for another architecture.
    """
    if config.get("model_type") != MODEL_TYPE:
        return None
    text, vision = config.get("text_config") or config, config["vision_config"]
    return PolicyShape(
        hidden=text["hidden_size"],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        mlp=text["intermediate_size"],
        vocabulary=text["vocab_size"],
        tied=config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
        vision_hidden=vision["hidden_size"],
        vision_layers=vision["depth"],
        vision_heads=vision["num_heads"],
        vision_mlp=vision["intermediate_size"],
        patch_px=vision["patch_size"],
        merge=vision["spatial_merge_size"],
    )
