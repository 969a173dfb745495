"""LoRA (arXiv 2106.09685) on the policy, by peft: added in place, switched off for the reference, merged for engines.

A layer y = W x becomes y = W x + (alpha / rank) B A x with W frozen. B starts at zero, so training starts at the policy
itself, and the policy with its adapter off is the policy that training started from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from sif_ray.config import LoraConfig
from sif_ray.policy.model import in_vision_tower

NAME = "default"
SEED = 0  # of the initial A: equal on every rank and in every run


def add_adapter(policy: nn.Module, config: LoraConfig) -> None:
    """Freeze `policy` and add an adapter to its linear layers, in place.

    They are those of the language model and, where it is not tied to the embeddings, the output layer (as released),
    with `config.targets` = "all" those of the vision tower too. Raises ValueError for rank 0.
    """
    layers = [
        name
        for name, module in policy.named_modules()
        if isinstance(module, nn.Linear)
        and (config.targets == "all" or not in_vision_tower(name))
        and module.weight is not policy.get_input_embeddings().weight
    ]
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha or 2 * config.rank,
        lora_dropout=config.dropout,
        target_modules=layers,
    )
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        peft.inject_adapter_in_model(settings, policy, NAME)


@contextmanager
def adapter_off(policy: nn.Module) -> Iterator[None]:
    """The policy without its adapter while the block lasts; a policy without one stays as it is."""
    layers = [module for module in policy.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


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
            return weight + self.layer.get_delta_weight(NAME).to(weight.dtype)


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
        low_rank = (layer.lora_A[NAME].weight, layer.lora_B[NAME].weight)
        yield MergedWeight(f"{prefix}.weight", (parameter, *low_rank), layer)
