"""Rendered manifests to look at and to break."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import yaml

from sif_ray.cluster.check import findings
from sif_ray.cluster.config import cluster_of_stage, load_cluster
from sif_ray.cluster.documents import Document, Manifests
from sif_ray.cluster.render import render
from sif_ray.cluster.schemas import Schemas

ROOT = Path(__file__).resolve().parents[2]
CRDS = ROOT.parent / "shared" / "kuberay-crds"
CLUSTER_FILES = sorted((ROOT / "configs" / "cluster").glob("*.yaml"))
NO_SCHEMAS = Schemas({})


@functools.cache
def rendered(name: str, *overrides: str) -> dict[str, str]:
    """Files of `configs/cluster/<name>.yaml`."""
    return render(load_cluster(str(ROOT / "configs" / "cluster" / f"{name}.yaml"), overrides))


@functools.cache
def _parsed(name: str, *overrides: str) -> Manifests:
    return as_manifests(rendered(name, *overrides))


def manifests_of(name: str, *overrides: str, only: str = "") -> Manifests:
    """Its objects, of one's own to change; `only` those of one name."""
    kept = [found for found in _parsed(name, *overrides).documents if only in ("", found.name)]
    return Manifests([Document(document.path, copy.deepcopy(document.body)) for document in kept])


def stage_manifests(stage: str, config: Path, *overrides: str) -> Manifests:
    """Objects of one stage on the default cluster."""
    return as_manifests(render(cluster_of_stage(stage, str(config), overrides), with_interactive=False))


def as_manifests(files: dict[str, str]) -> Manifests:
    documents = [
        Document(name, body) for name, text in files.items() for body in yaml.load_all(text, Loader=yaml.CSafeLoader)
    ]
    return Manifests(documents)


def get(manifests: Manifests, kind: str, name: str) -> dict[str, Any]:
    (found,) = [document for document in manifests.documents if (document.kind, document.name) == (kind, name)]
    return found.body


def workers(job: dict[str, Any]) -> list[dict[str, Any]]:
    spec = job["spec"]
    return (spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec)["workerGroupSpecs"]


def gpus_of(group: dict[str, Any]) -> int:
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return int(limits.get("nvidia.com/gpu", 0))


@functools.cache
def crds() -> Schemas:
    """KubeRay's schemas; the test skips without them."""
    if not CRDS.is_dir():
        pytest.skip(f"{CRDS} is not there")
    return Schemas.read(CRDS)


def found_in(manifests: Manifests, schemas: Schemas = NO_SCHEMAS) -> list[str]:
    return list(findings(manifests, schemas))
