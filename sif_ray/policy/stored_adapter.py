"""LoRA adapters in peft's folder layout: written for others, read from here or from LLaMA-Factory, merged per tensor.

adapter_config.json          rank, alpha, targets (a list, or a regular expression), name of the base
adapter_model.safetensors    base_model.model.<layer>.lora_A.weight and .lora_B.weight; whole layers that were
                             trained beside the adapter (modules_to_save) as base_model.model.<layer>.weight
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from sif_ray.config import ConfigError
from sif_ray.policy.shards import parameter_names

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_UNKNOWN = ("use_dora", "rank_pattern", "alpha_pattern", "bias", "layer_replication")
"""Settings of peft that change what a merge is; an adapter with one of them is refused."""


@dataclass(frozen=True)
class StoredAdapter:
    """Low-rank updates of some weights, and whole new values of others, by parameter name of the policy."""

    low_rank: Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # A (rank, inputs) and B (outputs, rank)
    whole: Mapping[str, torch.Tensor]
    rank: int
    alpha: float
    scaling: float  # alpha / rank, with rank-stabilised LoRA alpha / sqrt(rank)
    base: str = ""  # as the adapter's own file names it

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight with its update, in float32 where it has one: W + scaling * B A."""
        if name in self.whole:
            return self.whole[name]
        if name not in self.low_rank:
            return weight
        first, second = (factor.float() for factor in self.low_rank[name])
        return weight.float() + (second @ first) * self.scaling

    def check_base(self, shapes: Mapping[str, tuple[int, ...]], where: str, base: str) -> None:
        """Raise `ConfigError` unless every weight of the adapter is one of the base, in its shape."""
        for name, (first, second) in self.low_rank.items():
            _fits(name, (second.shape[0], first.shape[1]), shapes, where, base)
        for name, value in self.whole.items():
            _fits(name, tuple(value.shape), shapes, where, base)

    def save(self, folder: Path, base: str) -> None:
        """Write the adapter as peft does; `base` is the name under which its user finds the base."""
        targets = [name.removesuffix(".weight") for name in self.low_rank]
        if self.whole:
            raise ConfigError("--adapter: has whole layers too (modules_to_save); export it merged, without --adapter")
        settings = peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # a float is as good
            use_rslora=not math.isclose(self.scaling, self.alpha / self.rank),
            target_modules=targets,
            base_model_name_or_path=base,
            task_type=peft.TaskType.CAUSAL_LM,
            inference_mode=True,
        )
        settings.save_pretrained(str(folder))
        tensors = {}
        for target, (first, second) in zip(targets, self.low_rank.values(), strict=True):
            tensors[f"{_PREFIX}{target}{_A}"] = first.contiguous()
            tensors[f"{_PREFIX}{target}{_B}"] = second.contiguous()
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def read_adapter(folder: Path, policy: nn.Module) -> StoredAdapter:
    """The adapter in a folder, for a `skeleton` of its base. Raises `ConfigError` for one that cannot be merged."""
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if settings.get("peft_type") != "LORA":
        raise ConfigError(f"{folder / CONFIG}: peft_type {settings.get('peft_type')!r}; only LORA can be merged here")
    for key in _UNKNOWN:
        if settings.get(key) not in (None, False, "none", {}, []):
            raise ConfigError(f"{folder / CONFIG}: {key} = {settings[key]!r} is not known here; merge it with peft")
    file = folder / WEIGHTS
    if not file.is_file():
        raise ConfigError(f"{file}: missing; copy the whole adapter (weights are read from safetensors only)")
    with safe_open(file, framework="pt") as opened:
        tensors = {name.removeprefix(_PREFIX): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    rank, alpha = settings["r"], float(settings["lora_alpha"])
    scaling = alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
    return _adapter(tensors, policy, rank, alpha, scaling, settings.get("base_model_name_or_path") or "")


def adapter_of(tensors: Mapping[str, torch.Tensor], policy: nn.Module, alpha: float) -> StoredAdapter:
    """The adapter among the trained weights of a learner (`X.lora_A.default.weight`)."""
    plain = {name.replace(".default.weight", ".weight"): tensor for name, tensor in tensors.items()}
    rank = next(len(tensor) for name, tensor in plain.items() if name.endswith(_A))
    alpha = alpha or 2 * rank
    return _adapter(plain, policy, rank, alpha, alpha / rank, "")


def _adapter(
    tensors: Mapping[str, torch.Tensor], policy: nn.Module, rank: int, alpha: float, scaling: float, base: str
) -> StoredAdapter:
    layers = [name.removesuffix(_A) for name in tensors if name.endswith(_A)]
    weights = {f"{layer}.weight": layer for layer in layers}
    others = [name for name in tensors if not name.endswith((_A, _B))]
    names = parameter_names(policy, [*weights, *others])
    low_rank = {names[weight]: (tensors[layer + _A], tensors[layer + _B]) for weight, layer in weights.items()}
    return StoredAdapter(low_rank, {names[name]: tensors[name] for name in others}, rank, alpha, scaling, base)


def _fits(name: str, shape: Iterable[int], shapes: Mapping[str, tuple[int, ...]], where: str, base: str) -> None:
    if shapes.get(name) != tuple(shape):
        found = f"has shape {shapes[name]} there" if name in shapes else "is not there"
        raise ConfigError(
            f"{where}: the adapter changes {name} of shape {tuple(shape)}, which {found} in the base {base}; it is of "
            "another base; name the right one"
        )
