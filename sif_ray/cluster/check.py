"""`sif-ray cluster check`: what is wrong with manifests, before a cluster sees them."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sif_ray.cluster import contents, practice, rules
from sif_ray.cluster.documents import Document, Manifests, read
from sif_ray.cluster.schemas import Schemas

KUSTOMIZE = ("Kustomization", "Component")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sif-ray cluster check`."""
    parser.add_argument("paths", metavar="PATH", nargs="+", help="files with manifests, or folders of them")
    parser.add_argument(
        "--crds",
        metavar="DIR",
        help="folder with KubeRay's CRDs (its ray-operator/config/crd/bases); default: those of the cluster that "
        "kubectl talks to, and none where no cluster answers",
    )


def run(options: argparse.Namespace) -> int:
    """Print one line for every finding; 1 with any, else 0. Raises `ConfigError` for paths that cannot be read."""
    manifests = read(options.paths)
    schemas = Schemas.read(Path(options.crds)) if options.crds else Schemas.of_cluster()
    found = list(findings(manifests, schemas))
    sys.stdout.writelines(f"{finding}\n" for finding in found)
    if not found:
        sys.stdout.write(f"{len(manifests.documents)} documents, no findings\n")
    return 1 if found else 0


def findings(manifests: Manifests, schemas: Schemas) -> Iterator[str]:
    """`path: Kind/name: what is wrong; way out`, in the order of the files."""
    places = Counter((document.kind, document.namespace, document.name) for document in manifests.documents)
    for document in manifests.documents:
        faults = [*document.faults, *_faults(document, manifests, schemas)]
        if document.kind not in KUSTOMIZE and places[(document.kind, document.namespace, document.name)] > 1:
            faults.append("another file has an object of this kind, namespace and name; rename one")
        yield from (f"{document.where}: {fault}" for fault in dict.fromkeys(faults))


def _faults(document: Document, manifests: Manifests, schemas: Schemas) -> Iterator[str]:
    if not document.body or document.kind in KUSTOMIZE:
        return
    if not isinstance(document.body.get("metadata"), dict) or document.name == "?":
        yield "metadata.name is missing; every object has one"
    yield from schemas.faults(document)
    yield from rules.faults(document)
    yield from practice.faults(document)
    yield from contents.faults(document, manifests)
