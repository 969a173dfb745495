"""The size of a policy from a few numbers of its configuration, without loading it. No torch.

One class per architecture: Qwen2.5-VL (arXiv 2502.13923) and Qwen3-VL (arXiv 2511.21631).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sif_ray.toyworld import assets


@dataclass(frozen=True)
class PolicyShape:
    """Widths and depths of a Qwen2.5-VL: a vision tower of gated transformer blocks, a merger of 2 x 2 patches, and a
    language model with grouped-query attention.

    Example: `KNOWN["qwen2.5-vl-7b"].num_parameters == 8_292_166_656`.
    """

    model_type: ClassVar[str] = "qwen2_5_vl"  # in `config.json`

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
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(self.hidden, query), (self.hidden, kv), (self.hidden, kv), (query, self.hidden)]
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
        block = sum(inputs * outputs for inputs, outputs in self.language_linears)
        block += self._attention_vectors + 2 * self.hidden
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * block + self.hidden

    @property
    def _attention_vectors(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim  # biases of query, key and value

    @property
    def num_parameters(self) -> int:
        return self.vision_parameters + self.language_parameters

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PolicyShape:
        """The shape in a `config.json`, whose text settings stand in a block or, of old, at the top."""
        text, vision = config.get("text_config") or config, config["vision_config"]
        tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        return cls(**cls._sizes(text, vision), tied=tied)

    @staticmethod
    def _sizes(text: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, int]:
        return {
            "hidden": text["hidden_size"],
            "layers": text["num_hidden_layers"],
            "heads": text["num_attention_heads"],
            "kv_heads": text["num_key_value_heads"],
            "mlp": text["intermediate_size"],
            "vocabulary": text["vocab_size"],
            "vision_hidden": vision["hidden_size"],
            "vision_layers": vision["depth"],
            "vision_heads": vision["num_heads"],
            "vision_mlp": vision["intermediate_size"],
            "patch_px": vision["patch_size"],
            "merge": vision["spatial_merge_size"],
        }


@dataclass(frozen=True)
class Qwen3VLShape(PolicyShape):
    """Widths and depths of a dense Qwen3-VL. Against Qwen2.5-VL: heads of a width of their own with norms instead of
    biases, plain vision blocks with learned positions, and a merger more for each block that DeepStack reads.
    """

    model_type: ClassVar[str] = "qwen3_vl"

    patch_px: int = 16
    attention_head: int = 128
    positions: int = 2304  # of the vision tower's grid
    deepstack: int = 3  # vision blocks whose features go into the first language blocks

    @property
    def head_dim(self) -> int:
        return self.attention_head

    @property
    def vision_linears(self) -> list[tuple[int, int]]:
        width, mlp = self.vision_hidden, self.vision_mlp
        return [(width, 3 * width), (width, width), (width, mlp), (mlp, width)]

    @property
    def merger_linears(self) -> list[tuple[int, int]]:
        return super().merger_linears * (1 + self.deepstack)

    @property
    def vision_parameters(self) -> int:
        width = self.vision_hidden
        block = sum((inputs + 1) * outputs for inputs, outputs in self.vision_linears) + 4 * width
        norms = 2 * width * (1 + self.merge**2 * self.deepstack)  # DeepStack's are taken of merged patches
        mergers = sum((inputs + 1) * outputs for inputs, outputs in self.merger_linears) + norms
        patches = (3 * 2 * self.patch_px**2 + 1 + self.positions) * width
        return patches + self.vision_layers * block + mergers

    @property
    def _attention_vectors(self) -> int:
        return 2 * self.head_dim  # norms of query and key

    @staticmethod
    def _sizes(text: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, int]:
        own = {
            "attention_head": text["head_dim"],
            "positions": vision["num_position_embeddings"],
            "deepstack": len(vision["deepstack_visual_indexes"]),
        }
        return PolicyShape._sizes(text, vision) | own


SHAPES: dict[str, type[PolicyShape]] = {shape.model_type: shape for shape in (PolicyShape, Qwen3VLShape)}
"""The architectures that can be trained, by the `model_type` in `config.json`."""


def _qwen2_5(hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, vision_mlp: int = 3420) -> PolicyShape:
    return PolicyShape(hidden, layers, heads, kv_heads, mlp, 152064, False, 1280, 32, 16, vision_mlp)


def _qwen3(hidden: int, layers: int, heads: int, mlp: int, tied: bool, vision: tuple[int, int, int]) -> Qwen3VLShape:
    width, depth, vision_mlp = vision
    return Qwen3VLShape(hidden, layers, heads, 8, mlp, 151936, tied, width, depth, 16, vision_mlp)


KNOWN: dict[str, PolicyShape] = {
    "qwen2.5-vl-3b": PolicyShape(2048, 36, 16, 2, 11008, 151936, True, 1280, 32, 16, 3420),
    "qwen2.5-vl-7b": _qwen2_5(3584, 28, 28, 4, 18944),
    "qwen2.5-vl-32b": _qwen2_5(5120, 64, 40, 8, 27648, vision_mlp=3456),
    "qwen2.5-vl-72b": _qwen2_5(8192, 80, 64, 8, 29568, vision_mlp=3456),
    "qwen3-vl-2b": _qwen3(2048, 28, 16, 6144, True, (1024, 24, 4096)),
    "qwen3-vl-4b": _qwen3(2560, 36, 32, 9728, True, (1024, 24, 4096)),
    "qwen3-vl-8b": _qwen3(4096, 36, 32, 12288, False, (1152, 27, 4304)),
    "qwen3-vl-32b": _qwen3(5120, 64, 64, 25600, False, (1152, 27, 4304)),
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
        return shape, f"config.json of {policy}" + ("" if shape else f", which is none of {', '.join(SHAPES)}")
    for name, shape in KNOWN.items():
        if name in policy.lower():
            return shape, f"{name}, by the policy's name"
    return None, f"{policy} is not here, and its name holds none of {', '.join(KNOWN)}"


def shape_of(config: Mapping[str, Any]) -> PolicyShape | None:
    """The shape in a checkpoint's `config.json`; None for another architecture than `SHAPES`."""
    shape = SHAPES.get(config.get("model_type", ""))
    return shape.from_config(config) if shape else None
