"""Loading and saving the policy in the Hugging Face layout, and what makes its vision tower fast without a GPU."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionPatchEmbed,
    Qwen2_5_VLVisionAttention,
    apply_rotary_pos_emb_vision,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionAttention, Qwen3VLVisionPatchEmbed

from sif_ray.policy.fetch import fetch
from sif_ray.policy.shards import skeleton, stored_names, write_shards
from sif_ray.policy.tiled_attention import FLOAT32_ATTENTION

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
    policy: nn.Module, source: str, output: str, tensors: Iterable[tuple[str, torch.Tensor]] | None = None
) -> None:
    """Write `policy` to the folder `output`, with the processor files of `source`.

    `tensors` (parameter name, value) come in place of the policy's own weights; they are written as they come, a shard
    at a time. The folder appears under its name only when it is complete.
    """
    with unfinished(Path(output)) as folder:
        policy.config.architectures = [type(policy).__name__]
        policy.config.save_pretrained(folder)
        policy.generation_config.save_pretrained(folder)
        weights = policy.named_parameters() if tensors is None else tensors
        write_shards(folder, weights, stored_names(skeleton(policy.config)))
        copy_other_files(Path(resolve_model(source)), folder)


@contextmanager
def unfinished(output: Path) -> Iterator[Path]:
    """An empty folder that takes the name `output`, in place of what had it, when the block has ended well."""
    folder = output.with_name(output.name + ".unfinished")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    yield folder
    if output.exists():
        shutil.rmtree(output)
    folder.rename(output)


def copy_other_files(source: Path, folder: Path, skip: Collection[str] = ()) -> None:
    """Copy what a checkpoint folder holds beside its weights, where `folder` has no such file yet."""
    for file in source.iterdir():
        wanted = file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES) and file.name not in skip
        if wanted and not (folder / file.name).exists():
            shutil.copy2(file, folder / file.name)


def freeze_vision(policy: nn.Module) -> None:
    """Train nothing of `model.visual`: neither patch embedding and blocks nor the merger into the language model."""
    for name, parameter in policy.named_parameters():
        if in_vision_tower(name):
            parameter.requires_grad_(False)


def in_vision_tower(name: str) -> bool:
    """Whether a module or parameter of the policy is part of its vision tower, the merger included."""
    return name.startswith("model.visual.")


def resolve_model(model: str) -> str:
    """A folder for `model`: "toy" is the committed tiny policy, a folder stays, the folder behind an object-store URL
    ("s3://bucket/policy") and a hub id are downloaded once to a cache on this machine."""
    if model == "toy":
        from sif_ray.toyworld.assets import path

        return str(path("tiny_policy"))
    if Path(model).is_dir():
        return model
    if "://" in model:
        return str(fetch(model))
    from huggingface_hub import snapshot_download

    return snapshot_download(model)


def speed_up_vision_on_cpu(policy: nn.Module) -> None:
    """Replace the two slow parts of a vision tower by equal ones: one attention call for all images of a size instead
    of one each, and the patch embedding as a matrix product instead of a 3-D convolution (whose backward pass is slow
    on a CPU)."""
    for module in policy.modules():
        module.__class__ = _FASTER.get(type(module), type(module))


class _LinearPatches(nn.Module):
    proj: nn.Conv3d

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.proj.weight.flatten(1)
        return functional.linear(hidden_states.view(-1, weight.shape[1]).to(weight.dtype), weight, self.proj.bias)


class _BatchedAttention(nn.Module):
    """Put before the attention of a vision tower, whose parts it uses."""

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


class _Qwen2_5Patches(_LinearPatches, Qwen2_5_VisionPatchEmbed): ...


class _Qwen2_5Attention(_BatchedAttention, Qwen2_5_VLVisionAttention): ...


class _Qwen3Patches(_LinearPatches, Qwen3VLVisionPatchEmbed): ...


class _Qwen3Attention(_BatchedAttention, Qwen3VLVisionAttention): ...


_FASTER: dict[type[nn.Module], type[nn.Module]] = {
    Qwen2_5_VisionPatchEmbed: _Qwen2_5Patches,
    Qwen2_5_VLVisionAttention: _Qwen2_5Attention,
    Qwen3VLVisionPatchEmbed: _Qwen3Patches,
    Qwen3VLVisionAttention: _Qwen3Attention,
}
