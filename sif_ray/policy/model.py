"""Loading and saving the policy in the Hugging Face layout, and what makes its vision tower fast without a GPU."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForImageTextToText
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionPatchEmbed,
    Qwen2_5_VLVisionAttention,
    apply_rotary_pos_emb_vision,
)

WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".pt")


def load_policy(model: str, dtype: str = "float32") -> nn.Module:
    """The policy of a checkpoint folder or hub id, in evaluation mode, in `dtype` ("float32" or "bfloat16").

    Weights are read from safetensors only. On a machine without a GPU attention runs in float32 even under bfloat16
    autocast and the vision tower is made fast (`speed_up_vision_on_cpu`); outputs stay equal to rounding.
    """
    on_gpu = torch.cuda.is_available()
    policy = AutoModelForImageTextToText.from_pretrained(
        resolve_model(model),
        dtype=getattr(torch, dtype),
        attn_implementation="sdpa" if on_gpu else FLOAT32_ATTENTION,
        use_safetensors=True,
    )
    if not on_gpu:
        speed_up_vision_on_cpu(policy)
    return policy


def save_policy(
    policy: nn.Module, source: str, output: str, state_dict: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write `policy` (or `state_dict` in its place) to the folder `output`, with the processor files of `source`.

    The folder appears under its name only when it is complete.
    """
    folder = Path(output)
    unfinished = folder.with_name(folder.name + ".unfinished")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    policy.save_pretrained(unfinished, state_dict=None if state_dict is None else dict(state_dict))
    for file in Path(resolve_model(source)).iterdir():
        if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES) and not (unfinished / file.name).exists():
            shutil.copy2(file, unfinished / file.name)
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)


def freeze_vision(policy: nn.Module) -> None:
    """Train nothing of `model.visual`: neither patch embedding and blocks nor the merger into the language model."""
    for name, parameter in policy.named_parameters():
        if in_vision_tower(name):
            parameter.requires_grad_(False)


def in_vision_tower(name: str) -> bool:
    """Whether a module or parameter of the policy is part of its vision tower, the merger included."""
    return name.startswith("model.visual.")


def resolve_model(model: str) -> str:
    """A folder for `model`: "toy" is the committed tiny policy, a folder stays, a hub id is looked up in the cache."""
    if model == "toy":
        from sif_ray.toyworld.assets import path

        return str(path("tiny_policy"))
    if Path(model).is_dir():
        return model
    from huggingface_hub import snapshot_download

    return snapshot_download(model)


def speed_up_vision_on_cpu(policy: nn.Module) -> None:
    """Replace the two slow parts of Qwen2.5-VL's vision tower by equal ones: one attention call for all images of a
    size instead of one each, and the patch embedding as a matrix product instead of a 3-D convolution (whose backward
    pass is slow on a CPU)."""
    for module in policy.modules():
        if type(module) is Qwen2_5_VLVisionAttention:
            module.__class__ = _BatchedVisionAttention
        elif type(module) is Qwen2_5_VisionPatchEmbed:
            module.__class__ = _LinearPatchEmbed


FLOAT32_ATTENTION = "sdpa_float32"
"""Attention that leaves bfloat16 autocast: on a CPU its backward pass in bfloat16 is several times slower."""


def _attend_in_float32(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    with torch.autocast(query.device.type, enabled=False):
        attended, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **kwargs)
    return attended.to(query.dtype), None


AttentionInterface.register(FLOAT32_ATTENTION, _attend_in_float32)
AttentionMaskInterface.register(FLOAT32_ATTENTION, sdpa_mask)


class _LinearPatchEmbed(Qwen2_5_VisionPatchEmbed):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.proj.weight.flatten(1)
        return functional.linear(hidden_states.view(-1, weight.shape[1]).to(weight.dtype), weight)


class _BatchedVisionAttention(Qwen2_5_VLVisionAttention):
    def forward(
        self,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        lengths = cu_seqlens.diff()
        if position_embeddings is None or bool((lengths != lengths[0]).any()):
            return super().forward(hidden_states, cu_seqlens, position_embeddings, max_seqlen, **kwargs)
        total = hidden_states.shape[0]
        query, key, value = self.qkv(hidden_states).reshape(total, 3, self.num_heads, -1).unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        chunks = (len(lengths), int(lengths[0]), self.num_heads, -1)
        query, key, value = (states.reshape(chunks).transpose(1, 2) for states in (query, key, value))
        with torch.autocast(hidden_states.device.type, enabled=False):
            attended = functional.scaled_dot_product_attention(
                query.float(), key.float(), value.float(), scale=self.scaling
            )
        return self.proj(attended.transpose(1, 2).reshape(total, -1).to(hidden_states.dtype))
