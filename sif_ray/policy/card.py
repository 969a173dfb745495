"""The model card (README.md) of an exported policy: what it is, what it was made of and under which terms.

What is not known is said to be unknown, not guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from sif_ray.config import ConfigError, PromptConfig
from sif_ray.datagen.dataset import read_manifest
from sif_ray.method.prompts import user_content
from sif_ray.observe import jsonl

DEPTH_LICENCES = {
    "toy": "made by sif_ray, Apache-2.0",
    "small": "Depth Anything V2 Small, Apache-2.0",
    "base": "Depth Anything V2 Base, CC-BY-NC-4.0: no commercial use",
    "large": "Depth Anything V2 Large, CC-BY-NC-4.0: no commercial use",
}
"""By a word in the model's name; from the published model cards."""


def write_card(folder: Path, *, base: str, base_folder: Path, run: Path | None, adapter: bool, licence: str) -> None:
    """Write README.md to `folder` for a policy trained from `base` in the run folder `run`."""
    settings = _read_yaml(run / "config.yaml") if run else {}
    manifest = _find_manifest(settings)
    head: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["sif_ray", "sifthinker"],
    }
    head |= {"base_model": base} if base else {}
    head |= {"license": licence} if licence else {}
    sections = {
        "Asking it": _prompt(settings),
        "Training": "\n".join(_training(base, settings)),
        "Data": "\n".join(_data(settings, manifest)),
        "Measurements": "\n".join(_measurements(run)),
        "Licences": "\n".join(_licences(base_folder, manifest, licence)),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    title = "An adapter for a" if adapter else "A"
    text = f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {title} SIFThinker policy, by sif_ray\n\n{body}\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def _prompt(settings: Mapping[str, Any]) -> str:
    prompt = PromptConfig(**settings.get("prompt", {}))
    parts = user_content("QUESTION", depth_image=prompt.depth_image, with_depth_words=prompt.with_depth_words)
    shown = "".join("<image>" if part["type"] == "image" else part["text"] for part in parts)
    return (
        "One user turn, the images in this order: the photograph"
        + (", then its depth as a pseudo-colour picture" if prompt.depth_image else "")
        + f".\n\n```\n{shown}\n```"
    )


def _training(base: str, settings: Mapping[str, Any]) -> Iterator[str]:
    yield f"- base: {base or 'unknown'}"
    if not settings:
        yield "- settings: unknown (no run folder was given)"
        return
    learner = settings.get("learner", {})
    stage = "GRPO-SIF" if "objective" in settings else "supervised warm-up"
    rank = learner.get("lora", {}).get("rank", 0)
    yield f"- stage: {stage}, profile {settings.get('profile', 'corrected')}"
    what = f"LoRA of rank {rank}" if rank else "all weights"
    yield f"- trained: {what}, learning rate {learner.get('learning_rate')}"
    yield "\n<details><summary>all settings</summary>\n"
    yield f"```yaml\n{yaml.safe_dump(dict(settings), sort_keys=False)}```\n</details>"


def _data(settings: Mapping[str, Any], manifest: Mapping[str, Any]) -> Iterator[str]:
    if not settings.get("data"):
        yield "Unknown."
        return
    yield f"- dataset: {settings['data']}, split {settings.get('split')!r}"
    if not manifest:
        yield "- its manifest.json was not there when this card was written"
        return
    made = manifest["config"]
    counts = manifest["counts"]
    yield f"- rows: {counts['accepted']} accepted, {counts['rejected']} refused"
    yield f"- source: {made.get('source')}; teacher: {made.get('teacher', {}).get('kind', 'template')}"
    yield f"- depth model: {made.get('depth_model')}; profile: {made.get('profile')}"
    yield f"- hash of its settings: {manifest.get('config_hash')}"


def _measurements(run: Path | None) -> Iterator[str]:
    lines = jsonl.read(run / "metrics.jsonl") if run is not None and (run / "metrics.jsonl").is_file() else []
    if not lines:
        yield "None are known here."
        return
    last = lines[-1]
    yield f"Of the training's last step ({last['step']}), not of a benchmark:\n\n| metric | value |\n| --- | --- |"
    for name, value in last.items():
        if name not in ("step", "time_s") and isinstance(value, float):
            yield f"| {name} | {value:.4g} |"


def _licences(base_folder: Path, manifest: Mapping[str, Any], licence: str) -> Iterator[str]:
    yield f"- this policy: {licence or 'not stated; it cannot be freer than what it was made of'}"
    yield f"- base model: {_stated_licence(base_folder) or 'not stated in its folder; see its own page'}"
    depth_model = str(manifest.get("config", {}).get("depth_model", ""))
    known = next((text for word, text in DEPTH_LICENCES.items() if word in depth_model.lower()), "")
    yield f"- depth model: {known or 'unknown; see its own page'}"
    yield "- data: the terms of the photographs and annotations it was made from; a teacher's terms cover its traces"


def _stated_licence(folder: Path) -> str:
    """What the head of a folder's README.md says."""
    card = folder / "README.md"
    parts = card.read_text(encoding="utf-8").split("---\n") if card.is_file() else []
    head = yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0] else {}
    return str(head.get("license_name") or head.get("license") or "")


def _find_manifest(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        return read_manifest(settings["data"]) if settings.get("data") else {}
    except ConfigError:  # the dataset need not be where the policy is exported
        return {}


def _read_yaml(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}
