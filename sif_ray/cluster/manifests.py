"""The Kubernetes objects of a cluster file. Pure: plain dictionaries."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any
from urllib.parse import urlsplit

import yaml
from omegaconf import OmegaConf

from sif_ray.cluster.config import RAY_VERSION, ClusterConfig, load_stage
from sif_ray.cluster.groups import Group, Sizes, groups_of, is_fixed
from sif_ray.cluster.places import SERVE_PORT, on_cluster
from sif_ray.cluster.pods import (
    CONFIG_DIR,
    PART_OF,
    PROJECT,
    Manifest,
    container_security,
    head_group,
    labels,
    pod_security,
    pull_secrets,
    worker_group,
)
from sif_ray.config import ConfigError, EndpointConfig, ServeConfig, StageConfig

INTERACTIVE = "interactive"
SUBMITTER_RETRIES = 3  # of the pod that hands the job over, while the head is not reachable yet
SERVE_GRACE_S = 60  # of the old cluster after an upgrade, beside the longest request
API_PORTS = (443, 6443)  # object stores, model hub, HTTPS judges; API server


def stage_configs(cluster: ClusterConfig) -> dict[str, StageConfig]:
    """The configuration of every stage as its job on the cluster reads it. Raises `ConfigError`, naming the stage."""
    found: dict[str, StageConfig] = {}
    for stage, entry in cluster.stages.items():
        try:
            found[stage] = on_cluster(load_stage(stage, entry), cluster.storage)
        except ConfigError as error:
            raise ConfigError(f"stages.{stage}: {error}") from error
    return found


def settings(config: Any) -> dict[str, Any]:
    """What differs from the defaults, as nested values that `load_values` reads back to an equal configuration."""
    values = OmegaConf.to_container(OmegaConf.structured(config))
    defaults = OmegaConf.to_container(OmegaConf.structured(type(config)()))
    return _changed(values, defaults)  # type: ignore[arg-type]


def _changed(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        default = defaults[key]
        if isinstance(value, dict) and isinstance(default, dict) and value.keys() == default.keys():
            value, default = _changed(value, default), {}
        if value != default:
            found[key] = value
    return found


# --- jobs ------------------------------------------------------------------------------------------------------------


def config_map(cluster: ClusterConfig, stage: str, config: StageConfig) -> Manifest:
    """The stage's configuration as the file that the entry point names."""
    content = yaml.safe_dump(settings(config), sort_keys=False, width=120)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(cluster, f"{cluster.name}-{stage}", stage),
        "data": {f"{stage}.yaml": content},
    }


def ray_job(cluster: ClusterConfig, stage: str, config: StageConfig) -> Manifest:
    """The RayJob of generate, warm-up, GRPO or evaluate. Raises `ConfigError` for what no pods can hold."""
    jobs, fixed = cluster.jobs, is_fixed(config)
    metadata = _metadata(cluster, f"{cluster.name}-{stage}", stage)
    if fixed:
        metadata["labels"] |= queue_labels(cluster)
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": metadata,
        "spec": {
            "submissionMode": "K8sJobMode",
            "entrypoint": f"python jobs/{stage}.py --config {CONFIG_DIR}/{stage}.yaml",
            "metadata": {"project": PROJECT, "stage": stage},
            "backoffLimit": jobs.retries,
            "activeDeadlineSeconds": jobs.deadline_s,
            "preRunningDeadlineSeconds": jobs.start_deadline_s,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": jobs.keep_s,
            "submitterConfig": {"backoffLimit": SUBMITTER_RETRIES},
            "submitterPodTemplate": _submitter(cluster, stage),
            "rayClusterSpec": _ray_cluster(cluster, stage, stage_groups(cluster, config), autoscaled=not fixed),
        },
    }


def queue_labels(cluster: ClusterConfig) -> dict[str, str]:
    """By which a queue knows a gang."""
    queue = cluster.queue
    return {
        "none": {},
        "kueue": {"kueue.x-k8s.io/queue-name": queue.name},
        "volcano": {"ray.io/scheduler-name": "volcano", "volcano.sh/queue-name": queue.name},
    }[queue.kind]


def stage_groups(cluster: ClusterConfig, config: StageConfig) -> list[Group]:
    sizes = Sizes(cluster.cpu.cpus, cluster.cpu.task_pods, cluster.gpu.per_pod)
    return groups_of(config, sizes)


def _submitter(cluster: ClusterConfig, stage: str) -> Manifest:
    """The pod that hands the job to the head and follows its log."""
    container = {
        "name": "ray-job-submitter",
        "image": cluster.images.cpu,
        "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"memory": "1Gi"}},
        "securityContext": container_security(),
    }
    return {
        "metadata": {"labels": labels(stage)},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": pod_security(),
            **pull_secrets(cluster),
            "containers": [container],
        },
    }


def _ray_cluster(
    cluster: ClusterConfig, stage: str, groups: list[Group], *, autoscaled: bool, mounts_config: bool = True
) -> Manifest:
    scaling: Manifest = {"enableInTreeAutoscaling": autoscaled}
    if autoscaled:
        scaling["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": cluster.jobs.idle_timeout_s,
            "resources": {"requests": {"cpu": "500m", "memory": "512Mi"}, "limits": {"memory": "512Mi"}},
            "securityContext": container_security(),
        }
    return {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token"},
        **scaling,
        "headGroupSpec": head_group(cluster, stage, autoscaled=autoscaled, mounts_config=mounts_config),
        "workerGroupSpecs": [worker_group(cluster, stage, group, mounts_config=mounts_config) for group in groups],
    }


# --- serving, interactive use ----------------------------------------------------------------------------------------


def ray_service(cluster: ClusterConfig, config: ServeConfig) -> Manifest:
    """Edits of the configuration are rolled out in place; edits of pods start a second cluster, then switch to it."""
    groups = stage_groups(cluster, config)
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": _metadata(cluster, f"{cluster.name}-serve", "serve"),
        "spec": {
            "upgradeStrategy": {"type": "NewCluster"},
            "rayClusterDeletionDelaySeconds": math.ceil(config.timeout_s) + SERVE_GRACE_S,
            "excludeHeadPodFromServeSvc": True,
            "serveConfigV2": serve_config(config),
            "rayClusterConfig": _ray_cluster(
                cluster, "serve", groups, autoscaled=any(group.most > group.fewest for group in groups),
                mounts_config=False,
            ),
        },
    }  # fmt: skip


def serve_config(config: ServeConfig) -> str:
    """Ray Serve's own format, as YAML."""
    values = settings(config)
    for elsewhere in ("host", "port", "ray"):  # Serve's http_options, and the cluster itself
        values.pop(elsewhere, None)
    return yaml.safe_dump(
        {
            "proxy_location": "EveryNode",
            "http_options": {"host": config.host, "port": SERVE_PORT},
            "logging_config": {"encoding": "JSON", "log_level": "WARNING"},
            "applications": [
                {"name": "sif", "route_prefix": "/", "import_path": "sif_ray.serve.app:build_app", "args": values}
            ],
        },
        sort_keys=False,
        width=120,
    )


def interactive_cluster(cluster: ClusterConfig) -> Manifest:
    """A RayCluster for `ray job submit` and notebooks, which costs a head while nobody uses it."""
    groups = [Group("cpu", 0, 1 + cluster.cpu.task_pods, cluster.cpu.cpus, 0)]
    if cluster.interactive_gpu_pods:
        groups.append(Group("gpu", 0, cluster.interactive_gpu_pods, 1, cluster.gpu.per_pod))
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": _metadata(cluster, f"{cluster.name}-{INTERACTIVE}", INTERACTIVE),
        "spec": _ray_cluster(cluster, INTERACTIVE, groups, autoscaled=True, mounts_config=False),
    }


# --- what all share --------------------------------------------------------------------------------------------------


def base(cluster: ClusterConfig, configs: dict[str, StageConfig]) -> dict[str, list[Manifest]]:
    """Objects that every stage needs, by the name of their file."""
    return {
        "namespace": [_namespace(cluster)],
        "service-account": _service_account(cluster),
        "network-policy": _network_policies(cluster, configs),
        "storage": [_claim(cluster)],
    }


def secret_template(cluster: ClusterConfig) -> list[Manifest]:
    """Secrets without values, to be filled in a copy that nobody commits."""
    keys: dict[str, dict[str, str]] = {}
    for reference in cluster.secrets.values():
        keys.setdefault(reference.secret, {})[reference.key] = ""
    return [
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": _metadata(cluster, name, "base"),
            "type": "Opaque",
            "stringData": values,
        }
        for name, values in keys.items()
    ]


def _metadata(cluster: ClusterConfig, name: str, stage: str) -> Manifest:
    return {"name": name, "namespace": cluster.namespace, "labels": labels(stage)}


def _namespace(cluster: ClusterConfig) -> Manifest:
    guard = {
        f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")
    }  # root and privileges are refused
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": cluster.namespace, "labels": labels("base") | guard},
    }


def _service_account(cluster: ClusterConfig) -> list[Manifest]:
    """Of all pods. Only heads with an autoscaler get its token, with which they ask for pods."""
    metadata = _metadata(cluster, cluster.name, "base")
    account = dict(metadata)
    if cluster.service_account_annotations:
        account["annotations"] = dict(cluster.service_account_annotations)
    return [
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": account,
            "automountServiceAccountToken": False,
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "Role",
            "metadata": metadata,
            "rules": [
                {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch", "patch"]},
                {"apiGroups": ["ray.io"], "resources": ["rayclusters"], "verbs": ["get", "patch"]},
            ],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": metadata,
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": cluster.name},
            "subjects": [{"kind": "ServiceAccount", "name": cluster.name, "namespace": cluster.namespace}],
        },
    ]


def _claim(cluster: ClusterConfig) -> Manifest:
    storage = cluster.storage
    spec: Manifest = {
        "accessModes": [storage.access_mode],
        "resources": {"requests": {"storage": storage.size}},
    }
    if storage.storage_class:
        spec["storageClassName"] = storage.storage_class
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": _metadata(cluster, storage.claim, "base"),
        "spec": spec,
    }


def _network_policies(cluster: ClusterConfig, configs: dict[str, StageConfig]) -> list[Manifest]:
    """Nobody reaches a pod, but: our pods each other, the operator and Prometheus what they read, the gateway the
    served port."""
    ours = {"matchLabels": {PART_OF: PROJECT}}
    ports = sorted({*API_PORTS, *(port for config in configs.values() for port in endpoint_ports(config))})
    return [
        _policy(cluster, "deny", {}, {"policyTypes": ["Ingress", "Egress"]}),
        _policy(
            cluster,
            "pods",
            ours,
            {
                "policyTypes": ["Ingress", "Egress"],
                "ingress": [
                    {"from": [{"podSelector": ours}]},
                    {"from": [_of_namespace(cluster.operator_namespace)], "ports": [_tcp(8265), _tcp(SERVE_PORT)]},
                    {"from": [_of_namespace(cluster.prometheus_namespace)], "ports": [_tcp(8080)]},
                ],
                "egress": [
                    {"to": [{"podSelector": ours}]},
                    {"ports": [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")]},
                    {"ports": [_tcp(port) for port in ports]},
                ],
            },
        ),
        _policy(
            cluster,
            "served",
            {"matchLabels": labels("serve")},
            {
                "policyTypes": ["Ingress"],
                "ingress": [{"from": [_of_namespace(cluster.gateway_namespace)], "ports": [_tcp(SERVE_PORT)]}],
            },
        ),
    ]


def _policy(cluster: ClusterConfig, name: str, pods: Manifest, rules: Manifest) -> Manifest:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(cluster, f"{cluster.name}-{name}", "base"),
        "spec": {"podSelector": pods} | rules,
    }


def _of_namespace(name: str) -> Manifest:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


def _tcp(port: int) -> Manifest:
    return {"protocol": "TCP", "port": port}


def endpoint_ports(config: Any) -> Iterator[int]:
    """Ports of the judges, teachers and other models that a configuration asks over HTTP."""
    if isinstance(config, EndpointConfig) and config.is_called:
        address = urlsplit(config.base_url)
        yield address.port or (443 if address.scheme == "https" else 80)
    if is_dataclass(config):
        for value in vars(config).values():
            for block in value.values() if isinstance(value, dict) else [value]:
                yield from endpoint_ports(block)


def key_variables(config: Any) -> Iterator[str]:
    """Names of the environment variables that a configuration reads keys from."""
    if isinstance(config, EndpointConfig) and config.api_key_env and config.is_called:
        yield config.api_key_env
    if isinstance(config, ServeConfig) and config.api_keys_env:
        yield config.api_keys_env
    if is_dataclass(config):
        for value in vars(config).values():
            for block in value.values() if isinstance(value, dict) else [value]:
                yield from key_variables(block)
