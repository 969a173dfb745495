"""What a policy must be, checked from its files before anything expensive starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from sif_ray.config import ConfigError, LearnerConfig
from sif_ray.policy.model import resolve_model
from sif_ray.policy.shards import StoredWeights
from sif_ray.resources.memory import bytes_per_weight, trained_parameters
from sif_ray.resources.shapes import SHAPES, find_shape

IMAGE_TOKEN = "<|image_pad|>"
# Each needs one of its sets of files.
_PROCESSOR_FILES = {
    "image processor": (("preprocessor_config.json",), ("processor_config.json",)),
    "tokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "tokenizer's settings": (("tokenizer_config.json",),),
}
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


def check_policy(model: str, field: str = "policy", *, engine_on_cpu: bool = False) -> str:
    """The folder of a policy (`resolve_model`) that can be trained, and served by engines.

    Raises `ConfigError`, naming `field`, the file and the way out, for one that is not there, lacks a file, has weights
    that are cut off or of another shape than its config.json, or a tokenizer of another model; with `engine_on_cpu`
    also for tied embeddings, which vLLM cannot update there.
    """
    folder = _find(model, field)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"{field} = {model!r} is an adapter; merge it first: sif-ray export {model} --base BASE --output MERGED"
        )
    config = read_config(folder, field)
    _check_processor(folder, field)
    StoredWeights(folder)
    _check_vocabulary(folder, config, field)
    text = config.get("text_config") or config
    if engine_on_cpu and (config.get("tie_word_embeddings") or text.get("tie_word_embeddings")):
        raise ConfigError(
            f"{field} = {model!r}: tie_word_embeddings in {folder / 'config.json'}: vLLM on a CPU would keep a packed "
            "copy of lm_head after a weight update; give the engine a GPU (engine.num_gpus) or take an untied policy"
        )
    return str(folder)


def check_room(output: str | Path, num_bytes: float, field: str = "output") -> None:
    """Raise `ConfigError` when the disk of a folder that is to be written has less free than `num_bytes`."""
    place = Path(output).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise ConfigError(
            f"{field} = {str(output)!r}: {num_bytes / 1e9:.1f} GB are to be written, {place} has {free / 1e9:.1f} GB "
            "free; choose another disk or make room"
        )


def check_training_room(output: str, policy: str, learner: LearnerConfig, checkpoints_kept: int) -> None:
    """`check_room` for the policy and its checkpoints, with 12 bytes per trained weight (float32 and Adam's moments);
    one more than are kept is there while the newest is being written."""
    shape, _ = find_shape(policy)
    if shape is not None:
        states = 12 * trained_parameters(shape, learner) * (checkpoints_kept + 1)
        check_room(output, states + bytes_per_weight(learner) * shape.num_parameters)


def read_config(folder: Path, field: str) -> dict[str, Any]:
    """A checkpoint's config.json. Raises `ConfigError` where there is none, or one of an unknown architecture."""
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"{field}: {file} is missing; name a Hugging Face checkpoint folder")
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{field}: {file} is no JSON ({error}); copy the checkpoint again") from error
    if config.get("model_type") not in SHAPES:
        raise ConfigError(
            f"{field}: {file} has model_type {config.get('model_type')!r}; policies are {' or '.join(SHAPES)} "
            "(docs/models.md)"
        )
    return config


def _find(model: str, field: str) -> Path:
    try:
        return Path(resolve_model(model)).resolve()
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{field} = {model!r} is neither a folder nor a model that the hub gives ({type(error).__name__}); "
            "run the stage before it first, or name a checkpoint folder, a hub id or an object-store URL"
        ) from error


def _check_processor(folder: Path, field: str) -> None:
    for what, choices in _PROCESSOR_FILES.items():
        if not any(all((folder / name).is_file() for name in files) for files in choices):
            wanted = " or ".join(" and ".join(files) for files in choices)
            raise ConfigError(f"{field}: {folder} has no {wanted} ({what}); copy it from the base checkpoint")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if "chat_template" not in settings and not any((folder / name).is_file() for name in _TEMPLATE_FILES):
        raise ConfigError(
            f"{field}: {folder} has no chat template ({' or '.join(_TEMPLATE_FILES)}, or chat_template in "
            "tokenizer_config.json); copy it from the base checkpoint"
        )


def _check_vocabulary(folder: Path, config: dict[str, Any], field: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = (config.get("text_config") or config)["vocab_size"]
    if len(tokenizer) > rows:
        raise ConfigError(
            f"{field}: the tokenizer in {folder} has {len(tokenizer)} tokens, the embeddings {rows} rows (vocab_size "
            "in config.json); put the tokenizer files of the same checkpoint there"
        )
    image_token = tokenizer.convert_ids_to_tokens(config["image_token_id"])
    if image_token != IMAGE_TOKEN:
        raise ConfigError(
            f"{field}: image_token_id = {config['image_token_id']} in {folder / 'config.json'} is {image_token!r} in "
            f"the tokenizer, not {IMAGE_TOKEN}; put the tokenizer files of the same checkpoint there"
        )
