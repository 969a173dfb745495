"""`sif-ray cluster render`: manifests from the configurations that the jobs read."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from sif_ray.cluster.config import (
    RENDERED_STAGES,
    ClusterConfig,
    SecretConfig,
    cluster_of_stage,
    load_cluster,
)
from sif_ray.cluster.manifests import (
    INTERACTIVE,
    base,
    config_map,
    interactive_cluster,
    key_variables,
    ray_job,
    ray_service,
    secret_template,
    stage_configs,
)
from sif_ray.cluster.pods import Manifest
from sif_ray.config import ConfigError, StageConfig

log = logging.getLogger(__name__)

HEADER = "# Written by `sif-ray cluster render`. Change its configuration and render again.\n"
SECRETS_FILE = "base/secrets.template.yaml"
KUSTOMIZATION = "kustomization.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sif-ray cluster render`."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        required=True,
        help="a cluster file such as configs/cluster/production.yaml; with --stage, a configuration of that stage",
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="where the manifests go")
    parser.add_argument(
        "--stage",
        choices=RENDERED_STAGES,
        metavar="STAGE",
        help=f"the stage that FILE is for ({', '.join(RENDERED_STAGES)}), on the default cluster",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the cluster file")


def run(options: argparse.Namespace) -> None:
    """Write the manifests. Raises `ConfigError` for a configuration that cannot be run on such a cluster."""
    overrides = tuple(options.overrides)
    if options.stage:
        cluster = cluster_of_stage(options.stage, options.config, overrides)
    else:
        cluster = load_cluster(options.config, overrides)
    files = render(cluster, with_interactive=not options.stage)
    write(files, Path(options.output))
    log.info("%d files in %s; check them with sif-ray cluster check %s", len(files), options.output, options.output)


def render(cluster: ClusterConfig, *, with_interactive: bool = True) -> dict[str, str]:
    """Content of every file by its path. Raises `ConfigError`, which names the stage."""
    configs = stage_configs(cluster)
    cluster = _with_secrets(cluster, configs)
    folders: dict[str, dict[str, list[Manifest]]] = {"base": base(cluster, configs)}
    for stage, config in configs.items():
        own = _for_stage(cluster, stage, configs)
        try:
            if stage == "serve":
                folders["serve"] = {"serve": [ray_service(own, config)]}
            else:
                job = ray_job(own, stage, config)
                folders.setdefault("jobs", {})[stage] = [config_map(own, stage, config), job]
        except ConfigError as error:
            raise ConfigError(f"stages.{stage}: {error}") from error
    if with_interactive:
        folders[INTERACTIVE] = {INTERACTIVE: [interactive_cluster(cluster)]}
    files = {KUSTOMIZATION: _to_yaml([_kustomization(folders)])}
    for folder, contents in folders.items():
        files[f"{folder}/{KUSTOMIZATION}"] = _to_yaml([_kustomization(f"{name}.yaml" for name in contents)])
        files |= {f"{folder}/{name}.yaml": _to_yaml(documents) for name, documents in contents.items()}
    if secrets := secret_template(cluster):
        files[SECRETS_FILE] = "# Fill in a copy and apply that; never commit it.\n" + _to_yaml(secrets)
    return files


def write(files: Mapping[str, str], output: Path) -> None:
    """Raises `ConfigError` where the folder cannot be written."""
    try:
        for name, content in files.items():
            path = output / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {output}: {error}; choose another folder") from error


def _with_secrets(cluster: ClusterConfig, configs: Mapping[str, StageConfig]) -> ClusterConfig:
    """With a Secret for every variable that a configuration reads a key from and the cluster file does not name."""
    wanted = {variable for config in configs.values() for variable in key_variables(config)}
    found = {name: SecretConfig(f"{cluster.name}-secrets", name) for name in sorted(wanted - cluster.secrets.keys())}
    return replace(cluster, secrets=cluster.secrets | found)


def _for_stage(cluster: ClusterConfig, stage: str, configs: Mapping[str, StageConfig]) -> ClusterConfig:
    """Without the keys that only other stages read."""
    others = {variable for name, config in configs.items() if name != stage for variable in key_variables(config)}
    kept = {
        name: secret
        for name, secret in cluster.secrets.items()
        if name not in others or name in key_variables(configs[stage])
    }
    return replace(cluster, secrets=kept)


def _kustomization(resources: Iterable[str]) -> Manifest:
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": list(resources),
    }


class _Dumper(yaml.CSafeDumper):
    """Texts of several lines as blocks, and no aliases. Of the C library: ten times as fast."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.CSafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def _to_yaml(documents: Sequence[Manifest]) -> str:
    return HEADER + yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120)
