"""LoRA (arXiv 2106.09685) on the policy, by peft: added in place, switched for the reference, merged for engines.

A layer y = W x becomes y = W x + (alpha / rank) B A x with W frozen. B starts at zero, so training starts at the policy
itself, and the policy with its adapter off is the policy that training started from. Where training starts from an
adapter, that one is held a second time, frozen, under the name `REFERENCE`. QLoRA, i.e. W in 4 bits, is out of scope.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig

from sif_ray.config import ConfigError, LoraConfig
from sif_ray.policy.model import in_vision_tower, resolve_model
from sif_ray.policy.shards import StoredWeights, skeleton
from sif_ray.policy.stored_adapter import CONFIG, StoredAdapter, read_adapter

TRAINED, REFERENCE = "default", "reference"
SEED = 0  # of the initial A: equal on every rank and in every run


def add_adapter(policy: nn.Module, config: LoraConfig, name: str = TRAINED) -> None:
    """Freeze `policy` and add an adapter to its linear layers, in place.

    They are those of the language model and, where it is not tied to the embeddings, the output layer (as released),
    with `config.targets` = "all" those of the vision tower too. Raises ValueError for rank 0.
    """
    layers = [
        layer
        for layer, module in policy.named_modules()
        if isinstance(module, nn.Linear)
        and (config.targets == "all" or not in_vision_tower(layer))
        and module.weight is not policy.get_input_embeddings().weight
    ]
    _inject(policy, layers, config.rank, config.alpha or 2 * config.rank, config.dropout, name)


def starting_adapter(config: LoraConfig, base: str) -> StoredAdapter:
    """The adapter in the folder `config.adapter`, made by this package, peft or LLaMA-Factory, for the policy `base`.

    Raises `ConfigError` when it is of another base, or its rank or alpha is not that of `config`.
    """
    stored = _find_adapter(config.adapter, base, "learner.lora.adapter")
    scaling = (config.alpha or 2 * config.rank) / config.rank if config.rank else 0.0
    if (stored.rank, stored.scaling) != (config.rank, scaling):
        raise ConfigError(
            f"learner.lora.adapter = {config.adapter!r} has rank {stored.rank} and alpha {stored.alpha:g} (scaling "
            f"{stored.scaling:g}), but learner.lora.rank = {config.rank} and alpha = {config.alpha:g} (scaling "
            f"{scaling:g}); set them to the adapter's"
        )
    if stored.whole:
        raise ConfigError(
            f"learner.lora.adapter = {config.adapter!r} has whole layers (modules_to_save), e.g. "
            f"{min(stored.whole)}; merge it into the policy first (sif-ray export) and start from that"
        )
    return stored


def check_served_adapter(adapter: str, base: str, field: str) -> None:
    """Raise `ConfigError` unless the folder `adapter` has a LoRA adapter of the policy `base` that vLLM can put beside
    others: it changes the linear layers of the language model, and neither the vision tower nor the output layer."""
    if not (Path(adapter) / CONFIG).is_file():
        raise ConfigError(f"{field} = {adapter!r}: has no {CONFIG}; name the folder of a LoRA adapter")
    stored = _find_adapter(adapter, base, field)
    if others := [*stored.whole, *(name for name in stored.low_rank if not _in_language_layers(name))]:
        raise ConfigError(
            f"{field} = {adapter!r}: changes {min(others)}, and vLLM takes adapters of the language model's layers "
            f"only; merge it (sif-ray export {adapter} --base {base} --output MERGED) and serve that as policy"
        )


def _in_language_layers(name: str) -> bool:
    return ".layers." in name and not in_vision_tower(name)


def _find_adapter(adapter: str, base: str, field: str) -> StoredAdapter:
    folder = Path(resolve_model(base))
    stored = read_adapter(Path(adapter), skeleton(AutoConfig.from_pretrained(folder)))
    stored.check_base(StoredWeights(folder).shapes, f"{field} = {adapter!r}", base)
    return stored


def load_adapter(policy: nn.Module, stored: StoredAdapter, dropout: float, name: str) -> None:
    """Add the stored adapter to `policy` under `name`, in place. The adapter `TRAINED`, which must be the first one,
    stays the active one; others are frozen."""
    layers = [weight.removesuffix(".weight") for weight in stored.low_rank]
    _inject(policy, layers, stored.rank, stored.scaling * stored.rank, dropout, name)
    for layer, (low, high) in zip(layers, stored.low_rank.values(), strict=True):
        module = policy.get_submodule(layer)
        with torch.no_grad():
            module.lora_A[name].weight.copy_(low)
            module.lora_B[name].weight.copy_(high)
        module.set_adapter(TRAINED)  # peft has made the newest one active


@contextmanager
def with_adapter(policy: nn.Module, name: str) -> Iterator[None]:
    """The policy with the adapter `name` in place of the trained one while the block lasts, or without any where it has
    none of that name. Inside, no adapter can be trained."""
    layers = [module for module in policy.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        if name in layer.lora_A:
            layer.set_adapter(name, inference_mode=True)
        else:
            layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
            layer.set_adapter(TRAINED)


@dataclass(frozen=True)
class MergedWeight:
    """One weight of the policy as its checkpoint holds it, and what it is computed from."""

    name: str  # Hugging Face name
    parameters: tuple[nn.Parameter, ...]  # the weight itself, then A and B where it has an adapter
    layer: LoraLayer | None = None

    def value(self) -> torch.Tensor:
        """The weight itself, or W + (alpha / rank) B A as a tensor of its own. Every parameter must be whole: a ZeRO-3
        learner gathers them first."""
        weight = self.parameters[0].detach()
        if self.layer is None:
            return weight
        with torch.no_grad():
            return weight + self.layer.get_delta_weight(TRAINED).to(weight.dtype)


def merged_weights(policy: nn.Module) -> Iterator[MergedWeight]:
    """Every weight of the policy's checkpoint once, in the order of its parameters before an adapter was added."""
    for name, parameter in policy.named_parameters():
        if ".lora_" in name:
            continue
        if not name.endswith(".base_layer.weight"):
            yield MergedWeight(name.replace(".base_layer.", "."), (parameter,))
            continue
        prefix = name.removesuffix(".base_layer.weight")
        layer = policy.get_submodule(prefix)
        low_rank = (layer.lora_A[TRAINED].weight, layer.lora_B[TRAINED].weight)
        yield MergedWeight(f"{prefix}.weight", (parameter, *low_rank), layer)


def adapter_weights(policy: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A and B of every layer of the trained adapter, by their names in the policy."""
    for name, parameter in policy.named_parameters():
        if ".lora_" in name and f".{TRAINED}." in name:
            yield name, parameter


def _inject(policy: nn.Module, layers: Sequence[str], rank: int, alpha: float, dropout: float, name: str) -> None:
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # a float is as good
        lora_dropout=dropout,
        target_modules=list(layers),
    )
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        peft.inject_adapter_in_model(settings, policy, name)
