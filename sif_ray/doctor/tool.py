"""`sif-ray doctor`: what is wrong, before hours are spent.

request ─► need ─┬─► checks of this process and of the request's files and services ──┐
                 ├─► a run of its own cluster: checks of this machine ────────────────┼─► findings ─► table, JSON
                 └─► a cluster that is joined: checks of every node, and between them ┘
"""

from __future__ import annotations

import argparse
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sif_ray import config as configuration
from sif_ray.config import ConfigError, GenerateConfig, GrpoConfig, RayConfig, ServeConfig, StageConfig, WarmupConfig
from sif_ray.doctor.checkup import Check, examine
from sif_ray.doctor.cluster import LIMIT_S as CLUSTER_LIMIT_S
from sif_ray.doctor.cluster import cluster_findings, job_findings
from sif_ray.doctor.finding import FAULT, Finding, fault, ok
from sif_ray.doctor.need import Need, need_of
from sif_ray.doctor.report import as_json, counts_of, show, write

SLOW_LIMIT_S = 90.0  # of checks that import the libraries of models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sif-ray doctor`."""
    stages = ", ".join(configuration.STAGES)
    parser.add_argument(
        "stage",
        metavar="STAGE",
        nargs="?",
        choices=list(configuration.STAGES),
        help=f"look at what a run of it needs, too: {stages}",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the stage, as it takes them")
    parser.add_argument("--config", metavar="FILE", help="YAML file with the stage's settings")
    parser.add_argument("--json", metavar="OUT", type=Path, help="file for all findings")
    parser.add_argument(
        "--address",
        metavar="ADDRESS",
        help="of the Ray cluster to look at: local (none), auto or host:port (default: ray.address of the stage; "
        "without one the cluster of the job that asks, else local)",
    )


def run(options: argparse.Namespace) -> int:
    """Look, tell, and write `options.json`. 1 where anything is at fault. Raises `ConfigError` for a wrong request."""
    started_s = time.monotonic()
    config = _request(options)
    findings = look(config, options.address)
    seconds = time.monotonic() - started_s
    show(findings, seconds)
    if options.json:
        write(options.json, as_json(findings, options.stage, seconds))
    return 1 if counts_of(findings)[FAULT] else 0


def look(config: StageConfig | None, address: str | None = None) -> list[Finding]:
    """All findings; `config` None = of the machine alone, `address` None = that of the configuration."""
    if config is not None and address is not None:
        config = replace(config, ray=replace(config.ray, address=address))
    need = need_of(config) if config is not None else Need(address=address or RayConfig().cluster)
    from sif_ray.doctor import node

    checks = [Check("ray.address", lambda: job_findings(need)) if config is not None else None]
    checks += node.process_checks(need)
    if need.is_local:
        checks += node.machine_checks(need)
    else:
        checks.append(Check("Ray cluster", lambda: cluster_findings(need), CLUSTER_LIMIT_S + 10.0))
    if config is not None:
        checks += request_checks(config, need)
    return examine([check for check in checks if check is not None], node.secrets(need))


def _request(options: argparse.Namespace) -> StageConfig | None:
    if options.stage is None:
        if options.config or options.overrides:
            raise ConfigError(
                "--config is given without a stage; name it first, e.g. sif-ray doctor grpo --config FILE"
            )
        return None
    config: StageConfig = configuration.load(options.stage, options.config, options.overrides)
    return config


def request_checks(config: StageConfig, need: Need) -> list[Check]:
    """Of the files and services that a request names, as this process sees them."""
    from sif_ray.doctor import data, storage

    checks = [Check("plan", lambda: _plan(config), SLOW_LIMIT_S)]
    checks += _each("folder", need.outputs, storage.output_findings)
    checks += _each("dataset", need.datasets, data.dataset_findings)
    checks += _each("input", need.inputs, data.input_findings)
    if isinstance(config, GenerateConfig):
        checks.append(Check("input", lambda: data.generate_findings(config)))
    if isinstance(config, ServeConfig):
        checks.append(Check("keys of callers", lambda: _callers(config)))
        checks.append(Check("port", lambda: port_findings(config.host, config.port)))
    if need.trackers:
        checks.append(Check("trackers", lambda: _trackers(need)))
    return checks + _model_checks(config, need)


def _each(kind: str, places: tuple, find: Callable[[Any], Iterator[Finding]]) -> list[Check]:
    return [Check(f"{kind}: {at.field}", partial(find, at)) for at in places]


def _model_checks(config: StageConfig, need: Need) -> list[Check]:
    """Those that read checkpoints with transformers, one after another: its modules are made when they are used, and
    two threads that make them at once see half of them."""
    turns = threading.Lock()

    def check(name: str, function: str, *arguments: Any) -> Check:
        def find() -> list[Finding]:
            with turns:
                from sif_ray.doctor import models

                return list(getattr(models, function)(*arguments))

        return Check(name, find, SLOW_LIMIT_S)

    checks = [check(f"model: {at.field}", "policy_findings", at) for at in need.policies]
    checks += [check(f"model: {at.field}", "depth_findings", at) for at in need.depth_models]
    if isinstance(config, ServeConfig):
        checks += [check(f"model: {at.field}", "adapter_findings", at, config.policy) for at in need.adapters]
    if isinstance(config, GrpoConfig | WarmupConfig):
        checks.append(check("disk: output", "training_room_findings", config))
    return checks


def _plan(config: StageConfig) -> Iterator[Finding]:
    """The checks of a dry run. Raises `ConfigError` for a plan that cannot work."""
    from sif_ray.cli import plans

    list(plans(config))
    yield ok("plan", "holds, as far as it is known (--dry-run shows it)")


def _callers(config: ServeConfig) -> Iterator[Finding]:
    from sif_ray.serve.access import Keys

    yield ok("keys of callers", "set" if Keys.read(config) else "none: everybody who reaches the port may ask")


def _trackers(need: Need) -> Iterator[Finding]:
    from sif_ray.observe.trackers import check_trackers

    check_trackers(need.trackers)
    offline = os.environ.get("WANDB_MODE", "").lower() in ("offline", "disabled")
    known = os.environ.get("WANDB_API_KEY") or "api.wandb.ai" in _text(Path.home() / ".netrc")
    if "wandb" in need.trackers and not offline and not known:
        yield fault("trackers", "wandb has no key: it would ask for one", "set WANDB_API_KEY, or WANDB_MODE=offline")
    else:
        yield ok("trackers", ", ".join(need.trackers))


def port_findings(host: str, port: int) -> Iterator[Finding]:
    """Whether a port can be listened on; 0 = any."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            fix = "end what listens there, or choose another port (0 = any free one)"
            yield fault("port", f"{host}:{port} cannot be listened on: {error.strerror}", fix)
            return
    yield ok("port", f"{host}:{port} is free" if port else "any free one")


def _text(file: Path) -> str:
    return file.read_text(errors="replace") if file.is_file() else ""
