"""`sif-ray export`: a trained policy as others load it.

    policy folder (warm-up's or GRPO's checkpoint/) ─┐                  ┌─► merged checkpoint (default)
    training checkpoint (checkpoints/step-000012)   ─┼─ with its base ──┼─► adapter in peft's layout (--adapter)
    adapter in peft's layout (LLaMA-Factory's, too) ─┘                  └─► DeepSpeed universal checkpoint (--universal)

Weights pass through one tensor at a time, from files that are mapped into memory into the shard that is being written:
the memory that an export takes is that of a shard, whatever the size of the model.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sif_ray.config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from sif_ray.policy.shards import StoredWeights
    from sif_ray.policy.stored_adapter import StoredAdapter

log = logging.getLogger(__name__)

UNIVERSAL_WORKERS = 2  # processes that convert to a universal checkpoint, each with a rank's states in memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `run`."""
    parser.add_argument("checkpoint", help="policy folder, training checkpoint, or adapter folder of peft's layout")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to be written; must not exist yet")
    parser.add_argument("--base", default="", help="policy that the training began with, where it is not known here")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--adapter", action="store_true", help="write the adapter alone")
    form.add_argument(
        "--universal", action="store_true", help="write optimiser states too, for another number of ranks"
    )
    parser.add_argument("--dtype", default="", choices=("", "float32", "bfloat16"), help="default: that of the base")
    parser.add_argument(
        "--shard-gb", type=float, default=4.0, help="largest file of weights, in 10^9 bytes (default 4)"
    )
    parser.add_argument("--run", default="", metavar="FOLDER", help="run folder that the model card tells about")
    parser.add_argument("--license", default="", help="licence of the result, for its model card")


def run(options: argparse.Namespace) -> None:
    """Export as `options` say. Raises `ConfigError` for a request that cannot work, before anything is written."""
    output = Path(options.output)
    if output.exists():
        raise ConfigError(f"--output {output}: exists; name a folder that does not, or remove it")
    if options.shard_gb <= 0:
        raise ConfigError(f"--shard-gb {options.shard_gb:g}: must be positive")
    if options.universal:
        _write_universal(Path(options.checkpoint), output)
    else:
        _write_policy(open_source(options.checkpoint, options.base, options.run), output, options)
    log.info("exported to %s", output)


# --- what is exported ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A trained policy: its base, and what training made of some of the base's weights."""

    base_name: str  # as its user knows it
    base: Path
    stored: StoredWeights
    trained: Mapping[str, Tensor] = field(default_factory=dict)  # whole new values
    adapter: StoredAdapter | None = None
    run: Path | None = None  # folder of the run that made it

    def weights(self, dtype: Any) -> Iterator[tuple[str, Tensor]]:
        """Every weight of the policy by parameter name, one at a time."""
        for name in self.stored.shapes:
            value = self.trained[name] if name in self.trained else self.stored[name]
            if self.adapter is not None:
                value = self.adapter.merged(name, value)
            yield name, value.to(dtype)


def open_source(checkpoint: str, base: str = "", run: str = "") -> Source:
    """What is in a folder, with everything checked that can be checked without reading weights.

    `base` and `run` are found from the folder where they are not given: a run's `config.yaml`, an adapter's own file.
    """
    from transformers import AutoConfig

    from sif_ray.policy.check import check_policy
    from sif_ray.policy.shards import StoredWeights, skeleton
    from sif_ray.policy.stored_adapter import CONFIG, adapter_of, read_adapter
    from sif_ray.policy.trained_weights import TrainedWeights, find_learner

    folder = Path(checkpoint)
    learner = find_learner(folder)
    run_folder = Path(run) if run else _find_run(folder)
    settings = _run_settings(run_folder)
    if learner is not None:
        base = base or settings.get("policy", "")
        if not base:
            raise ConfigError(f"{folder}: its run has no config.yaml that names the policy it began with; give --base")
        path = Path(check_policy(base, "--base"))
        stored, trained = StoredWeights(path), TrainedWeights(learner)
        if any(".lora_" in name for name in trained):
            alpha = settings.get("learner", {}).get("lora", {}).get("alpha")
            if alpha is None:
                raise ConfigError(f"{folder}: has LoRA weights, but alpha is unknown; name its run folder with --run")
            adapter = adapter_of(trained, skeleton(AutoConfig.from_pretrained(path)), alpha)
            adapter.check_base(stored.shapes, str(folder), base)
            return Source(base, path, stored, adapter=adapter, run=run_folder)
        _check_trained(trained, stored, folder, base)
        return Source(base, path, stored, trained, run=run_folder)
    if (folder / CONFIG).is_file():
        base = base or json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path") or ""
        if not base:
            raise ConfigError(f"{folder / CONFIG}: names no base (base_model_name_or_path); give --base")
        path = Path(check_policy(base, "--base"))
        stored = StoredWeights(path)
        adapter = read_adapter(folder, skeleton(AutoConfig.from_pretrained(path)))
        adapter.check_base(stored.shapes, str(folder), base)
        return Source(base, path, stored, adapter=adapter, run=run_folder)
    path = Path(check_policy(checkpoint, "checkpoint"))
    return Source(base or settings.get("policy", ""), path, StoredWeights(path), run=run_folder)


def _check_trained(trained: Mapping[str, Tensor], stored: StoredWeights, folder: Path, base: str) -> None:
    for name in trained:
        if name not in stored.shapes:
            raise ConfigError(f"{folder}: holds {name}, which the base {base} has not; name the right one with --base")
        if tuple(trained[name].shape) != stored.shapes[name]:
            raise ConfigError(
                f"{folder}: {name} has shape {tuple(trained[name].shape)}, in the base {base} it is "
                f"{stored.shapes[name]}; name the right one with --base"
            )


def _find_run(folder: Path) -> Path | None:
    """The run folder around RUN/checkpoint, RUN/checkpoints/step-000012 or RUN/checkpoints/step-000012/learner."""
    above = list(folder.absolute().parents)[:3]
    return next((place for place in above if (place / "config.yaml").is_file()), None)


def _run_settings(run: Path | None) -> dict[str, Any]:
    import yaml

    return {} if run is None else yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) or {}


# --- writing ---------------------------------------------------------------------------------------------------------


def _write_policy(source: Source, output: Path, options: argparse.Namespace) -> None:
    import torch

    from sif_ray.policy.card import write_card
    from sif_ray.policy.check import check_room
    from sif_ray.policy.model import copy_other_files, unfinished
    from sif_ray.policy.shards import write_shards

    if options.adapter and source.adapter is None:
        raise ConfigError(
            f"--adapter: {options.checkpoint} has no adapter (its weights were trained whole or are merged); name a "
            "training checkpoint of a run with learner.lora.rank, or export it without --adapter"
        )
    config = json.loads((source.base / "config.json").read_text(encoding="utf-8"))
    dtype = getattr(torch, options.dtype or config.get("dtype") or config.get("torch_dtype") or "float32")
    if not options.adapter:
        check_room(
            output, sum(dtype.itemsize * math.prod(shape) for shape in source.stored.shapes.values()), "--output"
        )
    with unfinished(output) as folder:
        if options.adapter:
            assert source.adapter is not None
            source.adapter.save(folder, source.base_name)
        else:
            _write_config(folder, config, str(dtype).removeprefix("torch."))
            names = source.stored.stored_names  # the base's own, which whatever loads the base knows
            write_shards(folder, source.weights(dtype), names, int(options.shard_gb * 1e9))
        write_card(
            folder,
            base=source.base_name,
            base_folder=source.base,
            run=source.run,
            adapter=options.adapter,
            licence=options.license,
        )
        copy_other_files(source.base, folder, skip=("config.json", "generation_config.json") if options.adapter else ())


def _write_config(folder: Path, config: dict[str, Any], dtype: str) -> None:
    """The base's config.json as it is, so that whatever reads the base reads this too; only the type may be another."""
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    for block in (config, config.get("text_config", {}), config.get("vision_config", {})):
        if key in block or block is config:
            block[key] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_universal(checkpoint: Path, output: Path) -> None:
    """DeepSpeed's own conversion: one file per weight and optimiser state, whatever the number of ranks was."""
    from sif_ray.policy.check import check_room
    from sif_ray.policy.model import unfinished
    from sif_ray.policy.trained_weights import find_learner
    from sif_ray.policy.universal import to_universal

    learner = find_learner(checkpoint)
    if learner is None:
        raise ConfigError(f"--universal: {checkpoint} is no training checkpoint; name RUN/checkpoints/step-...")
    tag = (learner / "latest").read_text(encoding="utf-8").strip()
    if not list((learner / tag).glob("*zero_pp_rank_*_optim_states.pt")):
        raise ConfigError(f"--universal: {learner / tag} was written with zero_stage 0; any number of ranks reads it")
    size = sum(file.stat().st_size for file in (learner / tag).iterdir())
    check_room(output, 2 * size, "--output")  # the conversion keeps its fragments until it is done
    with unfinished(output) as folder:
        to_universal(learner / tag, folder / tag, UNIVERSAL_WORKERS)
        for name in ("latest", "latest_universal"):
            (folder / name).write_text(tag, encoding="utf-8")
        for file in (learner / tag).glob("rank*.pt"):
            shutil.copy2(file, folder / tag / file.name)
