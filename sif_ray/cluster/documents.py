"""Kubernetes objects in YAML files."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sif_ray.config import ConfigError


@dataclass(frozen=True)
class Document:
    """One object, and what is wrong with it already as YAML."""

    path: str
    body: dict[str, Any]
    faults: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return str(self.body.get("kind", "?"))

    @property
    def name(self) -> str:
        return str(self.metadata.get("name", "?"))

    @property
    def namespace(self) -> str:
        return str(self.metadata.get("namespace", ""))

    @property
    def metadata(self) -> dict[str, Any]:
        return as_dict(self.body.get("metadata"))

    @property
    def spec(self) -> dict[str, Any]:
        return as_dict(self.body.get("spec"))

    @property
    def where(self) -> str:
        return f"{self.path}: {self.kind}/{self.name}"


def as_dict(value: Any) -> dict[str, Any]:
    """`value`, or nothing where it is no mapping, which the schema says elsewhere."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


@dataclass
class Manifests:
    """All objects of a request, which may name each other."""

    documents: list[Document] = field(default_factory=list)

    def named(self, kind: str, name: str, namespace: str) -> Document | None:
        for document in self.documents:
            if (document.kind, document.name) == (kind, name) and document.namespace in (namespace, ""):
                return document
        return None


def read(paths: Sequence[str]) -> Manifests:
    """The objects in files and below folders (*.yaml, *.yml).

    Raises `ConfigError` for a path that does not exist, a folder without such files, and a file that is no YAML.
    """
    found = Manifests()
    for given in paths:
        path = Path(given)
        if not path.exists():
            raise ConfigError(f"{given}: no such file or folder")
        files = sorted(file for end in ("yaml", "yml") for file in path.rglob(f"*.{end}")) if path.is_dir() else [path]
        if not files:
            raise ConfigError(f"{given}: no *.yaml in this folder")
        for file in files:
            found.documents.extend(_documents(file))
    return found


def _documents(file: Path) -> Iterator[Document]:
    try:
        text = file.read_text(encoding="utf-8")
        loaded = list(_load(text))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    for body, faults in loaded:
        if body is None:
            continue
        if not isinstance(body, dict):
            yield Document(str(file), {}, (f"a {type(body).__name__} is no Kubernetes object; write a mapping",))
        elif body.get("kind") == "List":
            yield from (Document(str(file), as_dict(item), faults) for item in as_list(body.get("items")))
        else:
            yield Document(str(file), body, faults)


def _load(text: str) -> Iterator[tuple[Any, tuple[str, ...]]]:
    loader = _Loader(text)
    try:
        while loader.check_data():
            loader.faults = []
            yield loader.get_data(), tuple(loader.faults)
    finally:
        loader.dispose()


class _Loader(yaml.CSafeLoader):
    """Notes keys that stand twice in a mapping, of which YAML readers keep either."""

    faults: list[str]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in sorted({key for key in keys if keys.count(key) > 1}):
            self.faults.append(f"key {key!r} stands twice in one mapping; remove one")
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping
