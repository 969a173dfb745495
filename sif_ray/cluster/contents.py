"""What stands inside manifests: the entry point and its configuration, the groups it needs, Serve's configuration."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from omegaconf import OmegaConf

import sif_ray
from sif_ray import config as configuration
from sif_ray.cluster.config import RENDERED_STAGES, StorageConfig
from sif_ray.cluster.documents import Document, Manifests, as_dict, as_list
from sif_ray.cluster.groups import Group, Sizes, groups_of, is_fixed
from sif_ray.cluster.manifests import key_variables
from sif_ray.cluster.places import SERVE_PORT, on_cluster
from sif_ray.cluster.practice import gpus
from sif_ray.cluster.rules import cluster_spec, groups, pod, ray_container
from sif_ray.config import ConfigError, ServeConfig, StageConfig

CHECKOUT = Path(sif_ray.__file__).resolve().parents[1]
OUR_APP = "sif_ray.serve.app:build_app"


def faults(document: Document, manifests: Manifests) -> Iterator[str]:
    """Everything wrong inside a RayJob or RayService, and objects that ray.io kinds name and nobody has."""
    if document.kind == "RayJob":
        yield from _runtime_env_faults(document)
        yield from _job_faults(document, manifests)
    if document.kind == "RayService":
        yield from _service_faults(document)
    yield from _reference_faults(document, manifests)


def _reference_faults(document: Document, manifests: Manifests) -> Iterator[str]:
    """Where the files have objects of a kind at all, one that a pod names must be among them."""
    named: set[tuple[str, str]] = set()
    for _, group in groups(as_dict(cluster_spec(document))):
        named.add(("ServiceAccount", str(pod(group).get("serviceAccountName", ""))))
        for volume in as_list(pod(group).get("volumes")):
            claim = as_dict(as_dict(volume).get("persistentVolumeClaim")).get("claimName", "")
            named.add(("PersistentVolumeClaim", str(claim)))
    for kind, name in sorted(named):
        there = {
            other.name
            for other in manifests.documents
            if other.kind == kind and other.namespace in (document.namespace, "")
        }
        if name and there and name not in there:
            yield f"{kind} {name} is none of {', '.join(sorted(there))}; correct the name"


# --- jobs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """`python jobs/grpo.py --config FILE key=value`."""

    script: str
    config: str  # "" without one
    overrides: tuple[str, ...]

    @property
    def stage(self) -> str:
        return PurePosixPath(self.script).stem


def _job_faults(document: Document, manifests: Manifests) -> Iterator[str]:
    try:
        call = _call(str(document.spec.get("entrypoint", "")))
        if call.stage not in RENDERED_STAGES:
            return
        config = _mounted_config(document, manifests, call)
    except ConfigError as error:
        yield str(error)
        return
    cluster = as_dict(cluster_spec(document))
    yield from _place_faults(config, cluster)
    yield from _key_faults(config, cluster)
    yield from group_faults(config, cluster)


def _call(entrypoint: str) -> _Call:
    try:
        words = shlex.split(entrypoint)
    except ValueError as error:
        raise ConfigError(f"entrypoint {entrypoint!r}: {error}; close the quotes") from error
    script = next((word for word in words if word.endswith(".py")), "")
    if words[:1] != ["python"] or not script.startswith("jobs/"):
        raise ConfigError(f"entrypoint {entrypoint!r}: write python jobs/STAGE.py --config FILE")
    if not (CHECKOUT / script).is_file():
        raise ConfigError(f"entrypoint: {script} does not exist in the image; scripts are jobs/<name of a command>.py")
    rest = words[words.index(script) + 1 :]
    if "--dry-run" in rest:
        raise ConfigError("entrypoint: --dry-run runs nothing; remove it")
    config = rest[rest.index("--config") + 1] if "--config" in rest[:-1] else ""
    return _Call(script, config, tuple(word for word in rest if "=" in word and not word.startswith("-")))


def _mounted_config(document: Document, manifests: Manifests, call: _Call) -> StageConfig:
    """The stage's configuration in the ConfigMap that the head mounts. Raises `ConfigError`, saying what is missing."""
    if not call.config:
        raise ConfigError(f"entrypoint: no --config; mount a ConfigMap and name {call.stage}.yaml in it")
    head = as_dict(as_dict(cluster_spec(document)).get("headGroupSpec"))
    path = PurePosixPath(call.config)
    name = _config_map_at(head, path.parent)
    if name is None:
        raise ConfigError(f"entrypoint: {path} is not mounted in the head; mount its ConfigMap at {path.parent}")
    found = manifests.named("ConfigMap", name, document.namespace)
    if found is None:
        raise ConfigError(f"ConfigMap {name}, with the job's configuration, is not among the files; add it")
    content = as_dict(found.body.get("data")).get(path.name)
    if content is None:
        raise ConfigError(f"ConfigMap {name} has no {path.name}, which the entry point reads; rename its key")
    try:
        values = OmegaConf.merge(OmegaConf.create(str(content)), OmegaConf.from_dotlist(list(call.overrides)))
        return configuration.load_values(call.stage, as_dict(OmegaConf.to_container(values)))
    except yaml.YAMLError as error:
        raise ConfigError(f"ConfigMap {name}: {path.name} is no YAML: {' '.join(str(error).split())}") from error
    except ConfigError as error:
        raise ConfigError(f"ConfigMap {name}: {path.name} is no configuration of {call.stage}: {error}") from error


def _config_map_at(group: dict[str, Any], folder: PurePosixPath) -> str | None:
    volumes = {as_dict(volume).get("name"): as_dict(volume) for volume in as_list(pod(group).get("volumes"))}
    for mount in as_list(ray_container(group).get("volumeMounts")):
        if as_dict(mount).get("mountPath") == str(folder):
            volume = volumes.get(as_dict(mount).get("name"), {})
            return as_dict(volume.get("configMap")).get("name")
    return None


def _place_faults(config: StageConfig, cluster: dict[str, Any]) -> Iterator[str]:
    """Paths that pods do not have, and a Ray that the job would start instead of joining its own."""
    head = as_dict(cluster.get("headGroupSpec"))
    claims = {
        as_dict(volume).get("name")
        for volume in as_list(pod(head).get("volumes"))
        if "persistentVolumeClaim" in as_dict(volume)
    }
    mounts = [as_dict(mount) for mount in as_list(ray_container(head).get("volumeMounts"))]
    storage = next((str(mount.get("mountPath")) for mount in mounts if mount.get("name") in claims), None)
    if storage is None:
        yield "the head mounts no PersistentVolumeClaim; runs would be lost with their pods"
        return
    for name, group in groups(cluster):
        if storage not in {
            as_dict(mount).get("mountPath") for mount in as_list(ray_container(group).get("volumeMounts"))
        }:
            yield f"group {name} does not mount the storage at {storage}, as the head does; mount the claim there"
    try:
        moved = on_cluster(config, StorageConfig(mount=storage))
    except ConfigError as error:
        yield f"configuration: {error}"
        return
    for key, value in _unequal(config, moved):
        yield f"configuration: {key} = {value[0]!r} must be {value[1]!r} on this cluster; render it again"


def _unequal(config: StageConfig, moved: StageConfig) -> Iterator[tuple[str, tuple[Any, Any]]]:
    given, wanted = configuration.differences(config), configuration.differences(moved)
    for key in sorted(given.keys() | wanted.keys()):
        if given.get(key) != wanted.get(key) and not key.startswith("ray.object_store"):
            value, default = (given.get(key) or wanted[key])[0], (given.get(key) or wanted[key])[1]
            yield key, (value if key in given else default, wanted[key][0] if key in wanted else default)


def _key_faults(config: StageConfig, cluster: dict[str, Any]) -> Iterator[str]:
    for variable in sorted(set(key_variables(config))):
        for name, group in groups(cluster):
            entries = {as_dict(item).get("name"): as_dict(item) for item in as_list(ray_container(group).get("env"))}
            if "secretKeyRef" not in as_dict(entries.get(variable, {}).get("valueFrom")):
                yield f"group {name} lacks {variable}, which the configuration reads a key from; add it as secretKeyRef"


def _runtime_env_faults(document: Document) -> Iterator[str]:
    """What Ray refuses in a runtime environment when the job is submitted."""
    from ray.runtime_env import RuntimeEnv

    try:
        values = yaml.safe_load(str(document.spec.get("runtimeEnvYAML", "")))
        RuntimeEnv(**as_dict(values))
    except yaml.YAMLError:
        return  # said by the operator's rules
    except (TypeError, ValueError) as error:
        yield f"runtimeEnvYAML: {' '.join(str(error).split())}"


# --- groups ----------------------------------------------------------------------------------------------------------


def group_faults(config: StageConfig, cluster: dict[str, Any]) -> Iterator[str]:
    """Where the groups are not those that the configuration needs."""
    if is_fixed(config) and cluster.get("enableInTreeAutoscaling"):
        yield "enableInTreeAutoscaling: this stage needs all its pods at once; remove it"
    found = {name: group for name, group in groups(cluster) if name != "head"}
    try:
        wanted = groups_of(config, _sizes(found))
    except ConfigError as error:
        yield f"configuration: {error}"
        return
    for name in sorted(found.keys() - {group.name for group in wanted}):
        yield f"group {name} is not used by the configuration; remove it"
    for group in wanted:
        if group.name not in found:
            yield f"group {group.name} is missing: the configuration needs {_size(group)}; render it again"
        else:
            yield from _size_faults(group, found[group.name], is_fixed(config))


def _size_faults(wanted: Group, found: dict[str, Any], fixed: bool) -> Iterator[str]:
    has_gpus, most, cpus = gpus(found), found.get("maxReplicas"), _cpus(found)
    if has_gpus != wanted.num_gpus:
        yield (
            f"group {wanted.name} has {has_gpus} GPUs a pod, and the configuration needs {wanted.num_gpus}; render it "
            "again"
        )
    if cpus < wanted.num_cpus:
        yield f"group {wanted.name} has {cpus} CPUs a pod, and the configuration needs {wanted.num_cpus}; raise it"
    if fixed:
        counts = {found.get(key) for key in ("replicas", "minReplicas", "maxReplicas")}
        if counts != {wanted.fewest}:
            yield (
                f"group {wanted.name} has {' or '.join(sorted(map(str, counts)))} pods, and the configuration needs "
                f"exactly {wanted.fewest}; render it again"
            )
        label = as_dict(found.get("labels")).get("sif.role")
        if label != wanted.name:
            yield f"group {wanted.name} has the label sif.role={label}, by which actors find it; write {wanted.name}"
    elif isinstance(most, int) and (most != wanted.most if wanted.num_gpus else most < wanted.most):
        yield f"group {wanted.name} grows to {most} pods, and the configuration to {wanted.most}; render it again"


def _size(group: Group) -> str:
    pods = f"{group.most} pods" if group.most != 1 else "1 pod"
    return f"{pods} of {group.num_gpus} GPUs" if group.num_gpus else f"{pods} of {group.num_cpus} CPUs"


def _sizes(found: dict[str, dict[str, Any]]) -> Sizes:
    """What a configuration leaves open, as the manifest has it."""
    per_pod = max([1, *(gpus(group) for group in found.values())])
    return Sizes(max(1, _cpus(found.get("cpu", {}))), 1, per_pod)


def _cpus(group: dict[str, Any]) -> int:
    value = as_dict(group.get("rayStartParams")).get("num-cpus")
    resources = as_dict(ray_container(group).get("resources"))
    value = value or as_dict(resources.get("limits")).get("cpu") or as_dict(resources.get("requests")).get("cpu") or 0
    return int(value) if str(value).isdigit() else 0


# --- serving ---------------------------------------------------------------------------------------------------------


def _service_faults(document: Document) -> Iterator[str]:
    try:
        values = yaml.safe_load(str(document.spec.get("serveConfigV2", "")))
    except yaml.YAMLError as error:
        yield f"serveConfigV2 is no YAML: {' '.join(str(error).split())}"
        return
    if not isinstance(values, dict):
        yield "serveConfigV2 is empty; write Ray Serve's configuration"
        return
    yield from serve_schema_faults(values)
    cluster = as_dict(cluster_spec(document))
    if as_dict(values.get("http_options")).get("port", SERVE_PORT) != SERVE_PORT:
        yield f"serveConfigV2.http_options.port is not {SERVE_PORT}, the port of the pods and of the NetworkPolicy"
    for application in (as_dict(item) for item in as_list(values.get("applications"))):
        yield from _application_faults(application, cluster)


def _application_faults(application: dict[str, Any], cluster: dict[str, Any]) -> Iterator[str]:
    path = str(application.get("import_path", ""))
    if not _importable(path):
        yield f"serveConfigV2: import_path {path!r} does not exist in the image; ours is {OUR_APP}"
    if as_dict(application.get("runtime_env")).get("working_dir"):
        yield "serveConfigV2: runtime_env.working_dir; the code is in the image, remove it"
    if path != OUR_APP:
        return
    try:
        config: ServeConfig = configuration.load_values("serve", as_dict(application.get("args")))
    except ConfigError as error:
        yield f"serveConfigV2: args: {error}"
        return
    config = replace(config, host="0.0.0.0", port=SERVE_PORT, ray=replace(config.ray, address="auto"))
    yield from _place_faults(config, cluster)
    yield from _key_faults(config, cluster)
    yield from group_faults(config, cluster)


def serve_schema_faults(values: dict[str, Any]) -> Iterator[str]:
    """Ray Serve's own schema, and the unknown keys that it would ignore."""
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    try:
        ServeDeploySchema.model_validate(values)
    except ValidationError as error:
        for fault in error.errors():
            yield f"serveConfigV2.{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
    except ValueError as error:  # Serve's own checks
        yield f"serveConfigV2: {error}"
    for key in _unknown_keys(ServeDeploySchema, values, ""):
        yield f"serveConfigV2.{key} is no key of Ray Serve, which would ignore it; correct or remove it"


def _unknown_keys(model: Any, values: dict[str, Any], prefix: str) -> Iterator[str]:
    for key, value in values.items():
        if key not in model.model_fields:
            yield f"{prefix}{key}"
            continue
        inner = _model_in(model.model_fields[key].annotation)
        for number, item in enumerate(as_list(value) or [value]):
            if inner is not None and isinstance(item, dict):
                index = f".{number}" if isinstance(value, list) else ""
                yield from _unknown_keys(inner, item, f"{prefix}{key}{index}.")


def _model_in(annotation: Any) -> Any:
    """The pydantic model in an annotation such as `list[Model] | None`."""
    from pydantic import BaseModel

    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, UnionType, list):
        return next((model for inner in get_args(annotation) if (model := _model_in(inner)) is not None), None)
    return None


def _importable(path: str) -> bool:
    """Whether `module:name` is there, without running the module."""
    module, _, name = path.partition(":")
    try:
        spec = importlib.util.find_spec(module) if module and name else None
    except (ImportError, ValueError):
        return False
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return False
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    return any(
        getattr(node, "name", None) == name
        or (isinstance(node, ast.Assign) and any(getattr(target, "id", None) == name for target in node.targets))
        for node in tree.body
    )
