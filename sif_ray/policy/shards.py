"""The weights of a checkpoint folder, tensor by tensor: read from and written to safetensors files of limited size.

Neither side ever holds the whole model: the reader maps its files into memory, the writer holds the shard it fills.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key, revert_weight_conversion

from sif_ray.config import ConfigError

SHARD_BYTES = 4 * 10**9
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class ShardError(ConfigError):
    """A folder's weights are not there, not whole, or not those of its model."""


class StoredWeights:
    """The weights of a checkpoint folder by the names of the model's parameters.

    Example: `StoredWeights("runs/grpo/checkpoint")["model.language_model.norm.weight"]`.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises `ShardError` unless the files have every parameter of the model that `config.json` describes, in its
        shape."""
        files = files_by_tensor(Path(folder))
        opened = {file: safe_open(file, framework="pt") for file in set(files.values())}
        policy = skeleton(AutoConfig.from_pretrained(folder))
        self.shapes = {name: tuple(parameter.shape) for name, parameter in policy.named_parameters()}
        self.stored_names = {name: stored for stored, name in parameter_names(policy, files).items()}
        self._places = {name: (opened[files[stored]], stored) for name, stored in self.stored_names.items()}
        for name, shape in self.shapes.items():
            if name not in self._places:
                raise ShardError(f"{folder}: no tensor for {name} of its config.json; take a complete checkpoint")
            stored_file, stored = self._places[name]
            found = tuple(stored_file.get_slice(stored).get_shape())
            if found != shape:
                raise ShardError(f"{folder}: {stored} has shape {found}, config.json says {shape}: of two models")

    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor in the type of its file; its bytes are read when they are used."""
        file, stored = self._places[name]
        return file.get_tensor(stored)

    def num_bytes(self) -> int:
        """Bytes of all parameters as stored."""
        return sum(self[name].nbytes for name in self.shapes)


def skeleton(config: PreTrainedConfig) -> nn.Module:
    """The model of a configuration without memory for its weights (meta device)."""
    with torch.device("meta"):
        policy = AutoModelForImageTextToText.from_config(config)
    policy.tie_weights()
    return policy


def parameter_names(policy: nn.Module, stored: Iterable[str]) -> dict[str, str]:
    """The parameter of `policy` behind every stored name, in whichever version of transformers it was stored."""
    rules = [rule for rule in get_model_conversion_mapping(policy) if isinstance(rule, WeightRenaming)]
    parameters = dict(policy.named_parameters())
    return {name: rename_source_key(name, rules, [], policy.base_model_prefix, parameters)[0] for name in stored}


def stored_names(policy: nn.Module) -> dict[str, str]:
    """The name by which transformers stores every parameter of a `skeleton`."""
    names = [name for name, _ in policy.named_parameters()]
    numbered = {name: torch.tensor(number) for number, name in enumerate(names)}
    return {names[int(number)]: stored for stored, number in revert_weight_conversion(policy, numbered).items()}


def files_by_tensor(folder: Path) -> dict[str, Path]:
    """The file of every stored tensor. Raises `ShardError` for files that are missing or cut off."""
    index = folder / INDEX
    if index.is_file():
        weight_map: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: folder / file for name, file in weight_map.items()}
    else:
        files = dict.fromkeys(_names(folder / SINGLE), folder / SINGLE)
    for file in sorted(set(files.values())):
        lost = sorted({name for name, where in files.items() if where == file} - set(_names(file)))
        if lost:
            raise ShardError(f"{file}: does not hold {lost[0]}, which {index.name} says it has; copy the folder again")
    return files


def _names(file: Path) -> list[str]:
    if not file.is_file():
        raise ShardError(f"{file}: missing; copy the whole checkpoint (weights are read from safetensors only)")
    try:
        with safe_open(file, framework="np") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise ShardError(f"{file}: cut off or damaged ({error}); copy it again") from error


def write_shards(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    names: Mapping[str, str],
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write tensors, given by parameter name, as they come, under their stored `names`; returns their bytes.

    A file is written when the next tensor would make it larger than `shard_bytes`. One file alone is
    `model.safetensors`, several have an index.
    """
    parts: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    held = total = 0

    def write() -> None:
        save_file(shard, folder / f"part-{len(parts)}.safetensors", metadata={"format": "pt"})
        parts.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and held + tensor.nbytes > shard_bytes:
            write()
            held = 0
        shard[names[name]] = tensor.detach().contiguous()
        held += tensor.nbytes
        total += tensor.nbytes
    write()
    several = [f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors" for number in range(len(parts))]
    files = several if len(parts) > 1 else [SINGLE]
    for number, file in enumerate(files):
        (folder / f"part-{number}.safetensors").rename(folder / file)
    if len(parts) > 1:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total
