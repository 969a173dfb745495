"""Manifests against the schemas of their kinds: KubeRay's CRDs, and Kubernetes' own."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sif_ray.cluster.documents import Document
from sif_ray.config import ConfigError

log = logging.getLogger(__name__)

KUBERNETES_VERSION = "1.34"  # whose built-in kinds are checked
CRDS = tuple(f"ray{kind}s.ray.io" for kind in ("cluster", "job", "service", "cronjob"))
KUBECTL_TIMEOUT_S = 5
ELSEWHERE = {"monitoring.coreos.com", "kustomize.config.k8s.io"}
"""Groups of kinds that we ship and whose schemas are not at hand."""


class Schemas:
    """The schemas of ray.io kinds, where they were found."""

    def __init__(self, validators: dict[tuple[str, str], Any]) -> None:
        self._validators = validators

    @classmethod
    def read(cls, folder: Path) -> Schemas:
        """From the CRDs in a folder, such as `ray-operator/config/crd/bases` of KubeRay. Raises `ConfigError`."""
        files = sorted(folder.glob("*.yaml"))
        found = cls._of([body for file in files for body in _load(file.read_text(encoding="utf-8"))])
        if not found._validators:
            raise ConfigError(f"--crds {folder}: no CustomResourceDefinition of ray.io in this folder")
        return found

    @classmethod
    def of_cluster(cls) -> Schemas:
        """From the cluster that `kubectl` talks to; without one, none, which is said once."""
        command = ["kubectl", "get", "crd", *CRDS, "--ignore-not-found", "--output=yaml"]
        try:
            reply = subprocess.run(
                [*command, f"--request-timeout={KUBECTL_TIMEOUT_S}s"],
                capture_output=True,
                text=True,
                check=True,
                timeout=2 * KUBECTL_TIMEOUT_S,
            )
        except (OSError, subprocess.SubprocessError):
            log.warning(
                "schemas of ray.io kinds are not checked: no cluster answers kubectl; name their folder (--crds)"
            )
            return cls({})
        lists = _load(reply.stdout)
        return cls._of([body for found in lists for body in (found.get("items", [found]) if found else [])])

    @classmethod
    def _of(cls, definitions: list[Any]) -> Schemas:
        from jsonschema import Draft202012Validator

        validators = {}
        for definition in definitions:
            if (definition or {}).get("kind") != "CustomResourceDefinition":
                continue
            spec = definition["spec"]
            for version in spec["versions"]:
                schema = _strict(version["schema"]["openAPIV3Schema"], is_root=True)
                schema["properties"]["metadata"] = {"type": "object"}
                name = f"{spec['group']}/{version['name']}"
                validators[(name, spec["names"]["kind"])] = Draft202012Validator(schema)
        return cls(validators)

    def faults(self, document: Document) -> Iterator[str]:
        """What the API server would refuse or drop."""
        version = str(document.body.get("apiVersion", ""))
        group = version.rpartition("/")[0]
        if group == "ray.io":
            yield from self._ray_faults(version, document)
        elif group not in ELSEWHERE:
            yield from _built_in_faults(document)

    def _ray_faults(self, version: str, document: Document) -> Iterator[str]:
        if version != "ray.io/v1":
            yield f"apiVersion {version} is deprecated or unknown; write ray.io/v1"
        if not self._validators:
            return
        validator = self._validators.get((version, document.kind))
        if validator is None:
            yield f"{version} has no kind {document.kind}; kinds are {', '.join(sorted(self.kinds))}"
            return
        yield from (_told(error) for error in validator.iter_errors(document.body))

    @property
    def kinds(self) -> set[str]:
        return {kind for _, kind in self._validators}


def _built_in_faults(document: Document) -> Iterator[str]:
    if importlib.util.find_spec("kubernetes_validate") is None:
        _tell_missing()
        return
    import kubernetes_validate

    if not all(isinstance(document.body.get(key), str) for key in ("apiVersion", "kind")):
        yield "apiVersion or kind is missing; every object names both"
        return
    try:
        kubernetes_validate.validate(document.body, KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield _told(error)
    except (kubernetes_validate.SchemaNotFoundError, kubernetes_validate.InvalidSchemaError):
        yield f"Kubernetes {KUBERNETES_VERSION} has no {document.body['apiVersion']} {document.kind}; check both"


_told_missing: list[bool] = []


def _tell_missing() -> None:
    if not _told_missing:
        log.warning("built-in kinds are not checked: pip install kubernetes-validate")
        _told_missing.append(True)


def _told(error: Any) -> str:
    place = ".".join(map(str, error.absolute_path)) or "the object"
    message = str(error.message)
    return f"{place}: {message if len(message) < 200 else message[:197] + '...'} (schema)"


def _load(text: str) -> list[Any]:
    return list(yaml.load_all(text, Loader=yaml.CSafeLoader))


def _strict(schema: Any, *, is_root: bool = False) -> Any:
    """A structural schema of the API server as JSON Schema: unknown fields are refused, as `kubectl --validate=strict`
    does, and what has a default is not required, as it is filled in before."""
    if not isinstance(schema, dict):
        return schema
    strict = dict(schema)
    if strict.pop("x-kubernetes-int-or-string", False):
        strict.pop("anyOf", None)
        strict.pop("pattern", None)
        strict["type"] = ["integer", "string"]
    if strict.pop("nullable", False) and isinstance(strict.get("type"), str):
        strict["type"] = [strict["type"], "null"]
    if "properties" in strict:
        properties = strict["properties"]
        strict["required"] = [name for name in strict.get("required", []) if "default" not in properties.get(name, {})]
        strict["properties"] = {name: _strict(inner) for name, inner in properties.items()}
        is_open = "additionalProperties" in strict or strict.get("x-kubernetes-preserve-unknown-fields")
        if not is_root and not is_open:
            strict["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(strict.get(key), dict):
            strict[key] = _strict(strict[key])
    return strict
