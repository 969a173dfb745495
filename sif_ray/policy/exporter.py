"""A trained policy, however it is stored, and the forms in which others load it.

    policy folder (warm-up's or GRPO's checkpoint/) ─┐                  ┌─► merged checkpoint
    training checkpoint (checkpoints/step-000012)   ─┼─ with its base ──┼─► adapter in peft's layout
    adapter in peft's layout (LLaMA-Factory's, too) ─┘                  └─► DeepSpeed universal checkpoint

Weights pass through one tensor at a time, from files that are mapped into memory into the shard that is being written:
an export takes the memory of a shard and of the largest tensor, whatever the size of the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig

from sif_ray.config import ConfigError
from sif_ray.policy.card import write_card
from sif_ray.policy.check import check_policy, check_room
from sif_ray.policy.model import copy_other_files, unfinished
from sif_ray.policy.shards import SHARD_BYTES, StoredWeights, skeleton, write_shards
from sif_ray.policy.stored_adapter import CONFIG, StoredAdapter, adapter_of, read_adapter
from sif_ray.policy.torch_files import check_intact
from sif_ray.policy.trained_weights import TrainedWeights, find_learner
from sif_ray.policy.universal import to_universal

UNIVERSAL_WORKERS = 2  # processes that convert to a universal checkpoint, each with a rank's states in memory


@dataclass(frozen=True)
class TrainedPolicy:
    """A base, and what training made of some of its weights."""

    base_name: str  # as its user knows it; "" = unknown
    base: Path
    stored: StoredWeights
    trained: Mapping[str, torch.Tensor] = field(default_factory=dict)  # whole new values
    adapter: StoredAdapter | None = None
    run: Path | None = None  # folder of the run that made it

    def weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight by parameter name, one at a time."""
        for name in self.stored.shapes:
            value = self.trained[name] if name in self.trained else self.stored[name]
            if self.adapter is not None:
                value = self.adapter.merged(name, value)
            yield name, value.to(dtype)


def open_trained(checkpoint: str, base: str = "", run: str = "") -> TrainedPolicy:
    """The policy in a folder, with everything checked that can be checked before it is exported.

    `base` and `run` are found from the folder where they are not given: a run's `config.yaml`, an adapter's own file.
    Raises `ConfigError` for what is no policy, is damaged, or does not fit its base.
    """
    folder = Path(checkpoint)
    run_folder = Path(run) if run else _find_run(folder)
    settings = _settings(run_folder)
    learner = find_learner(folder)
    if learner is not None:
        return _open_training(folder, learner, base or settings.get("policy", ""), run_folder, settings)
    if (folder / CONFIG).is_file():
        return _open_adapter(folder, base, run_folder)
    path = Path(check_policy(checkpoint, "checkpoint"))
    return TrainedPolicy(base or settings.get("policy", ""), path, StoredWeights(path), run=run_folder)


def _open_training(
    folder: Path, learner: Path, base: str, run: Path | None, settings: Mapping[str, Any]
) -> TrainedPolicy:
    if not base:
        raise ConfigError(f"{folder}: its run has no config.yaml that names the policy it began with; give --base")
    path = Path(check_policy(base, "--base"))
    stored, trained = StoredWeights(path), TrainedWeights(learner)
    if not any(".lora_" in name for name in trained):
        _check_trained(trained, stored, folder, base)
        return TrainedPolicy(base, path, stored, trained, run=run)
    alpha = settings.get("learner", {}).get("lora", {}).get("alpha")
    if alpha is None:
        raise ConfigError(f"{folder}: has LoRA weights, but alpha is unknown; name its run folder with --run")
    adapter = adapter_of(trained, skeleton(AutoConfig.from_pretrained(path)), alpha)
    adapter.check_base(stored.shapes, str(folder), base)
    return TrainedPolicy(base, path, stored, adapter=adapter, run=run)


def _open_adapter(folder: Path, base: str, run: Path | None) -> TrainedPolicy:
    base = base or json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path") or ""
    if not base:
        raise ConfigError(f"{folder / CONFIG}: names no base (base_model_name_or_path); give --base")
    path = Path(check_policy(base, "--base"))
    stored = StoredWeights(path)
    adapter = read_adapter(folder, skeleton(AutoConfig.from_pretrained(path)))
    adapter.check_base(stored.shapes, str(folder), base)
    return TrainedPolicy(base, path, stored, adapter=adapter, run=run)


def _check_trained(trained: TrainedWeights, stored: StoredWeights, folder: Path, base: str) -> None:
    for name in trained:
        if name not in stored.shapes:
            raise ConfigError(f"{folder}: holds {name}, which the base {base} has not; name the right one with --base")
        if trained.shape(name) != stored.shapes[name]:
            raise ConfigError(
                f"{folder}: {name} has shape {trained.shape(name)}, in the base {base} it is {stored.shapes[name]}; "
                "name the right one with --base"
            )


def _find_run(folder: Path) -> Path | None:
    """The run folder around RUN/checkpoint, RUN/checkpoints/step-000012 or RUN/checkpoints/step-000012/learner."""
    above = list(folder.absolute().parents)[:3]
    return next((place for place in above if (place / "config.yaml").is_file()), None)


def _settings(run: Path | None) -> dict[str, Any]:
    return {} if run is None else yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) or {}


# --- writing ---------------------------------------------------------------------------------------------------------


def write_merged(
    policy: TrainedPolicy, output: Path, licence: str = "", *, dtype: str = "", shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a whole checkpoint that loads wherever the base loads: its configuration and its names of the weights.

    `dtype` "" = that of the base.
    """
    config = json.loads((policy.base / "config.json").read_text(encoding="utf-8"))
    dtype = dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
    kind = getattr(torch, dtype)
    check_room(output, kind.itemsize * sum(math.prod(shape) for shape in policy.stored.shapes.values()), "--output")
    with unfinished(output) as folder:
        _write_config(folder, config, dtype)
        write_shards(folder, policy.weights(kind), policy.stored.stored_names, shard_bytes)
        _write_card(folder, policy, licence, adapter=False)
        copy_other_files(policy.base, folder)


def write_adapter(policy: TrainedPolicy, output: Path, licence: str = "") -> None:
    """Write the adapter alone, with the tokenizer and processor. Raises `ConfigError` for a policy without one."""
    if policy.adapter is None:
        raise ConfigError(
            "--adapter: the policy has no adapter (its weights were trained whole or are merged); name a training "
            "checkpoint of a run with learner.lora.rank, or export it without --adapter"
        )
    with unfinished(output) as folder:
        policy.adapter.save(folder, policy.base_name)
        _write_card(folder, policy, licence, adapter=True)
        copy_other_files(policy.base, folder, skip=("config.json", "generation_config.json"))


def write_universal(checkpoint: Path, output: Path) -> None:
    """Write DeepSpeed's universal checkpoint of a training checkpoint, by DeepSpeed's own conversion, for other
    programs: the learner itself resumes from any number of ranks without it."""
    learner = find_learner(checkpoint)
    if learner is None:
        raise ConfigError(f"--universal: {checkpoint} is no training checkpoint; name RUN/checkpoints/step-...")
    tag = (learner / "latest").read_text(encoding="utf-8").strip()
    if not list((learner / tag).glob("*zero_pp_rank_*_optim_states.pt")):
        raise ConfigError(f"--universal: {learner / tag} was written with zero_stage 0; any number of ranks reads it")
    size = sum(file.stat().st_size for file in (learner / tag).iterdir())
    check_room(output, 2 * size, "--output")  # the conversion keeps its fragments until it is done
    check_intact(sorted((learner / tag).glob("*.pt")))
    with unfinished(output) as folder:
        to_universal(learner / tag, folder / tag, UNIVERSAL_WORKERS)
        for name in ("latest", "latest_universal"):
            (folder / name).write_text(tag, encoding="utf-8")


def _write_config(folder: Path, config: dict[str, Any], dtype: str) -> None:
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    for block in (config, config.get("text_config", {}), config.get("vision_config", {})):
        if key in block or block is config:
            block[key] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_card(folder: Path, policy: TrainedPolicy, licence: str, *, adapter: bool) -> None:
    write_card(folder, base=policy.base_name, base_folder=policy.base, run=policy.run, adapter=adapter, licence=licence)
