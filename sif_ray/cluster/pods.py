"""Templates of Ray pods: non-root, one container, memory and GPUs requested as they are limited."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sif_ray.cluster.config import ClusterConfig, MachinesConfig
from sif_ray.cluster.groups import Group
from sif_ray.resources.placement import ROLE_LABEL
from sif_ray.runtime import NODE_ENVIRONMENT, SERVE_ENVIRONMENT

Manifest = dict[str, Any]

CODE_DIR = "/opt/sif_ray"  # of the image
CONFIG_DIR = "/etc/sif_ray"  # where the ConfigMap with the stage's configuration is mounted
USER_ID = 1000  # of the image
PART_OF, COMPONENT = "app.kubernetes.io/part-of", "app.kubernetes.io/component"
PROJECT = "sif-ray"

STOP_JOB = "pkill -TERM -f '[p]ython jobs/' || exit 0; while pgrep -f '[p]ython jobs/' > /dev/null; do sleep 1; done"
"""Before the head ends: the job's process saves its step, as on Ctrl-C."""


@dataclass(frozen=True)
class PodSpec:
    """What differs between the pods of a Ray cluster."""

    stage: str  # a stage, or "interactive"
    image: str
    cpus: int
    memory_gib: int
    gpus: int
    machines: MachinesConfig
    is_head: bool = False
    mounts_config: bool = True
    autoscaled: bool = False
    saves: bool = False  # the job ends its step when it is stopped


def labels(stage: str) -> dict[str, str]:
    """Of every object: `kubectl -l app.kubernetes.io/component=grpo` finds those of a stage."""
    return {PART_OF: PROJECT, COMPONENT: stage}


def head_group(cluster: ClusterConfig, stage: str, *, autoscaled: bool, mounts_config: bool = True) -> Manifest:
    """The group of the head, on which no actor of ours runs."""
    head = cluster.head
    spec = PodSpec(
        stage,
        cluster.images.cpu,
        head.cpus,
        head.memory_gib,
        0,
        head,
        is_head=True,
        mounts_config=mounts_config,
        autoscaled=autoscaled,
        saves=stage in ("warmup", "grpo", "generate", "evaluate"),
    )
    return {
        "serviceType": "ClusterIP",
        "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},
        "template": pod_template(cluster, spec),
    }


def worker_group(cluster: ClusterConfig, stage: str, group: Group, *, mounts_config: bool = True) -> Manifest:
    """A group of workers with the label by which GRPO's actors find their machines."""
    on_gpus = group.num_gpus > 0
    gpu, cpu = cluster.gpu, cluster.cpu
    cpus = max(group.num_cpus, gpu.cpus_per_gpu * group.num_gpus if on_gpus else cpu.cpus)
    memory = gpu.memory_gib_per_gpu * group.num_gpus if on_gpus else cpu.memory_gib
    image = cluster.images.gpu if on_gpus else cluster.images.cpu
    spec = PodSpec(stage, image, cpus, memory, group.num_gpus, gpu if on_gpus else cpu, mounts_config=mounts_config)
    return {
        "groupName": group.name,
        "replicas": group.fewest,
        "minReplicas": group.fewest,
        "maxReplicas": group.most,
        "labels": {ROLE_LABEL: group.name},
        "rayStartParams": {"num-cpus": str(cpus)},
        "template": pod_template(cluster, spec),
    }


def pod_template(cluster: ClusterConfig, spec: PodSpec) -> Manifest:
    """The pod of a Ray node."""
    grace_s = cluster.jobs.stop_s + 30 if spec.is_head and spec.saves else 60
    return {
        "metadata": {"labels": labels(spec.stage)},
        "spec": {
            "serviceAccountName": cluster.name,
            "automountServiceAccountToken": spec.is_head and spec.autoscaled,  # the autoscaler asks the API server
            "securityContext": pod_security(),
            **pull_secrets(cluster),
            **_machines(spec.machines),
            "terminationGracePeriodSeconds": grace_s,
            "containers": [_container(cluster, spec)],
            "volumes": _volumes(cluster, spec),
        },
    }


def pod_security() -> Manifest:
    """Of every pod."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER_ID,
        "runAsGroup": USER_ID,
        "fsGroup": USER_ID,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> Manifest:
    """Of every container."""
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def pull_secrets(cluster: ClusterConfig) -> Manifest:
    secret = cluster.images.pull_secret
    return {"imagePullSecrets": [{"name": secret}]} if secret else {}


def environment(cluster: ClusterConfig, stage: str) -> list[Manifest]:
    """Variables of a Ray container: those of every node of ours, the cluster file's, and secrets by reference."""
    values = NODE_ENVIRONMENT | {
        "HF_HOME": f"{cluster.storage.mount}/hub",  # one download of a model for all pods
        "NCCL_DEBUG": "WARN",
        "NCCL_SOCKET_IFNAME": "^lo,docker",  # a pod has one interface, whatever its name
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_JOB_STOP_WAIT_TIME_S": str(cluster.jobs.stop_s),  # from SIGTERM to SIGKILL
    }
    if stage == "serve":
        values |= SERVE_ENVIRONMENT | {"RAY_SERVE_ENABLE_HA_PROXY": "1"}
    plain = [{"name": name, "value": value} for name, value in sorted((values | cluster.environment).items())]
    return plain + [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": value.secret, "key": value.key}}}
        for name, value in sorted(cluster.secrets.items())
    ]


def _container(cluster: ClusterConfig, spec: PodSpec) -> Manifest:
    memory = {"memory": f"{spec.memory_gib}Gi"} | ({cluster.gpu.resource: str(spec.gpus)} if spec.gpus else {})
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}, {"name": "storage", "mountPath": cluster.storage.mount}]
    if spec.mounts_config:
        mounts.append({"name": "config", "mountPath": CONFIG_DIR, "readOnly": True})
    stop = STOP_JOB if spec.is_head and spec.saves else "ray stop"
    return {
        "name": "ray-head" if spec.is_head else "ray-worker",
        "image": spec.image,
        "imagePullPolicy": "IfNotPresent",
        "workingDir": CODE_DIR,
        "env": environment(cluster, spec.stage),
        "ports": _ports(spec),
        "resources": {"requests": {"cpu": str(spec.cpus)} | memory, "limits": memory},  # a busy head is not throttled
        "securityContext": container_security(),
        "lifecycle": {"preStop": {"exec": {"command": ["/bin/sh", "-c", stop]}}},
        "volumeMounts": mounts,
    }


def _ports(spec: PodSpec) -> list[Manifest]:
    ports = {"gcs-server": 6379, "dashboard": 8265} if spec.is_head else {}
    ports |= {"serve": 8000} if spec.stage == "serve" else {}
    return [{"name": name, "containerPort": port} for name, port in (ports | {"metrics": 8080}).items()]


def _volumes(cluster: ClusterConfig, spec: PodSpec) -> list[Manifest]:
    """The object store (30 % of the memory) and what NCCL and torch share lie in /dev/shm; it counts as memory."""
    volumes: list[Manifest] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{max(1, spec.memory_gib // 2)}Gi"}},
        {"name": "storage", "persistentVolumeClaim": {"claimName": cluster.storage.claim}},
    ]
    if spec.mounts_config:
        volumes.append({"name": "config", "configMap": {"name": f"{cluster.name}-{spec.stage}"}})
    return volumes


def _machines(machines: MachinesConfig) -> Manifest:
    found: Manifest = {}
    if machines.node_selector:
        found["nodeSelector"] = dict(machines.node_selector)
    if machines.tolerations:
        found["tolerations"] = [
            {"key": one.key, "operator": one.operator, "effect": one.effect}
            | ({"value": one.value} if one.operator == "Equal" else {})
            for one in machines.tolerations
        ]
    if machines.priority_class:
        found["priorityClassName"] = machines.priority_class
    return found
