"""Policies, adapters and depth models: whether their files are there, whole and of one model, and their licences."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from sif_ray.config import ConfigError, GrpoConfig, WarmupConfig
from sif_ray.doctor.endpoints import unreachable
from sif_ray.doctor.finding import Finding, fault, note, ok
from sif_ray.doctor.licences import restriction_of_depth, restriction_of_policy
from sif_ray.doctor.machine import working_folders
from sif_ray.doctor.need import TOY, Place, Policy
from sif_ray.doctor.weights import weight_faults
from sif_ray.policy.check import check_policy, check_room, check_training_room
from sif_ray.resources.shapes import find_shape
from sif_ray.storage import Folder

HUB = "https://huggingface.co"
DEPTH_FILES = ("config.json", "preprocessor_config.json")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_COPY_AGAIN = "copy the checkpoint again, with every file"


def policy_findings(policy: Policy, environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """All that a stage would refuse, from the files. Raises `ConfigError` as `check_policy` does. Downloads nothing."""
    check = f"model: {policy.field}"
    folder = yield from _located(check, policy, environ)
    if folder is not None:
        faults = [fault(check, f"{policy.place}: {why}", _COPY_AGAIN) for why in weight_faults(folder)]
        yield from faults
        if not faults and folder.is_local:
            check_policy(folder.path, policy.field, engine_on_cpu=policy.engine_on_cpu)
            yield ok(check, f"{policy.place}: files are complete and of one model")
        elif not faults:
            yield ok(check, f"{policy.place}: weights are complete; the rest is checked when it has been copied here")
    if restriction := restriction_of_policy(policy.place):
        yield note(f"licence: {policy.field}", restriction, "take another size, or ask for a licence")


def depth_findings(model: Place, environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Files and licence of a depth model. Downloads nothing."""
    check = f"model: {model.field}"
    folder = yield from _located(check, model, environ)
    if folder is not None:
        missing = [f"{name} is missing" for name in DEPTH_FILES if not folder.exists(name)]
        faults = [*missing, *weight_faults(folder)]
        yield from (fault(check, f"{model.place}: {why}", _COPY_AGAIN) for why in faults)
        if not faults:
            yield ok(check, f"{model.place}: files are complete")
    if restriction := restriction_of_depth(model.place):
        yield note(f"licence: {model.field}", restriction, "take Depth-Anything-V2-Small-hf (Apache-2.0)")


def adapter_findings(adapter: Place, base: str) -> Iterator[Finding]:
    """Of a LoRA adapter that is served beside its base. Raises `ConfigError` where it cannot be."""
    from sif_ray.policy.adapter import check_served_adapter

    check_served_adapter(adapter.place, base, adapter.field)
    yield ok(f"model: {adapter.field}", f"{adapter.place}: fits {base}")


def training_room_findings(config: GrpoConfig | WarmupConfig) -> Iterator[Finding]:
    """Raises `ConfigError` where the disk has no room for a run's checkpoints."""
    if "://" not in config.output:
        check_training_room(config.output, config.policy, config.learner, config.checkpoints_kept)
        yield ok("disk: output", "room for the policy and its checkpoints")


def _located(check: str, model: Place, environ: Mapping[str, str]) -> Iterator[Finding]:
    """The folder of a model's files, None for one that is still to be downloaded."""
    if model.place == TOY:
        from sif_ray.toyworld.assets import path

        return Folder.open(path("tiny_policy" if isinstance(model, Policy) else "tiny_depth"), model.field)
    if "://" in model.place or Path(model.place).is_dir():
        folder = Folder.open(model.place, model.field)
        if not folder.names():
            raise ConfigError(f"{model.field} = {model.place!r} is empty or not there; name the checkpoint's folder")
        return folder
    if not _HUB_ID.fullmatch(model.place):
        fix = "run the stage before it first, or name a checkpoint folder, a hub id or an object-store URL"
        yield fault(check, f"{model.place}: no such folder", fix)
        return None
    cached = _cached(model.place)
    if cached is None:
        yield _to_be_downloaded(check, model, environ)
        return None
    return Folder.open(cached, model.field)


def _cached(model: str) -> str | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return snapshot_download(model, local_files_only=True)
    except LocalEntryNotFoundError:
        return None


def _to_be_downloaded(check: str, model: Place, environ: Mapping[str, str]) -> Finding:
    """What is to be said of a model of the hub that is not here. Raises `ConfigError` where the disk is too small."""
    told = f"{model.place}: neither a folder here nor in the hub's cache"
    offline = next((name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_true(environ.get(name))), "")
    if offline:
        fix = f"download it where there is a network (hf download {model.place}), or unset {offline}"
        return fault(check, f"{told}, and {offline} forbids to download it", fix)
    hub = urlsplit(environ.get("HF_ENDPOINT", HUB))
    if why := unreachable(hub.hostname or "", hub.port or 443):
        return fault(check, f"{told}, and the hub is out of reach: {why}", f"copy it here, and set {model.field} to it")
    shape, _ = find_shape(model.place)
    if shape is not None:
        check_room(working_folders(environ)["cache of the model hub"], 2 * shape.num_parameters, "HF_HOME")
    return note(check, f"{told}; it is downloaded when the run starts", f"hf download {model.place} on every node")


def _is_true(value: str | None) -> bool:
    return (value or "").upper() in ("1", "ON", "YES", "TRUE")
