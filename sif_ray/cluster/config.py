"""What a Kubernetes cluster gives to the stages: images, storage, secrets, machines, a queue. No Ray."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from sif_ray import __version__
from sif_ray import config as configuration
from sif_ray.config import Check, ConfigError
from sif_ray.secret_names import looks_secret

RAY_VERSION = metadata.version("ray")
IMAGE_TAG = f"{__version__}-ray{RAY_VERSION}"
"""Every image's tag begins with it, so that code, Ray and manifest cannot disagree; `-cpu` or `-gpu` follows."""

RENDERED_STAGES = ("generate", "warmup", "grpo", "evaluate", "serve")

_NAME = r"[a-z]([-a-z0-9]*[a-z0-9])?"  # DNS-1035
_MAX_PREFIX = 47 - len("-interactive")  # RayJob and RayService may have 47 characters
_QUANTITY = r"[1-9][0-9]*(Mi|Gi|Ti)"


@dataclass
class ImagesConfig:
    cpu: str = f"sif-ray:{IMAGE_TAG}-cpu"
    gpu: str = f"sif-ray:{IMAGE_TAG}-gpu"
    pull_secret: str = ""  # name of the Secret with the registry's password; "" = none

    CHECKS: ClassVar[list[Check]] = [
        (key, lambda v: IMAGE_TAG in v.rpartition(":")[2], f"the tag must contain {IMAGE_TAG}: this code, its Ray")
        for key in ("cpu", "gpu")
    ]


@dataclass
class StorageConfig:
    """Where inputs and outputs lie: a volume that all pods mount and, for datasets, maybe a bucket."""

    claim: str = "sif-storage"  # PersistentVolumeClaim
    mount: str = "/mnt/sif"  # in every pod; relative paths of a stage's configuration lie below it
    size: str = "1Ti"
    storage_class: str = ""  # one with ReadWriteMany, e.g. NFS; "" = the cluster's default
    access_mode: str = "ReadWriteMany"  # "ReadWriteOnce" only where all pods run on one machine
    bucket: str = ""  # e.g. "s3://bucket/sif": relative paths of datasets, annotations and depth lie there instead

    CHECKS: ClassVar[list[Check]] = [
        ("claim", lambda v: re.fullmatch(_NAME, v), "must be the name of a PersistentVolumeClaim"),
        ("mount", lambda v: re.fullmatch(r"(/[\w.-]+)+", v), "must be an absolute path"),
        ("size", lambda v: re.fullmatch(_QUANTITY, v), "must be a size such as 500Gi"),
        ("access_mode", lambda v: v in ("ReadWriteMany", "ReadWriteOnce"), "must be ReadWriteMany or ReadWriteOnce"),
        ("bucket", lambda v: not v or re.fullmatch(r"\w+://[^?]+", v), "must be a URL such as s3://bucket/sif"),
    ]


@dataclass
class SecretConfig:
    """A value that Kubernetes keeps."""

    secret: str = ""  # name of the Secret
    key: str = ""

    CHECKS: ClassVar[list[Check]] = [
        ("secret", lambda v: v, "must name a Secret"),
        ("key", lambda v: v, "must name a key of the Secret"),
    ]


@dataclass
class TolerationConfig:
    key: str = ""
    operator: str = "Exists"
    value: str = ""  # of the operator "Equal"
    effect: str = "NoSchedule"

    CHECKS: ClassVar[list[Check]] = [
        ("key", lambda v: v, "must name a taint"),
        ("operator", lambda v: v in ("Exists", "Equal"), "must be Exists or Equal"),
        ("effect", lambda v: v in ("NoSchedule", "NoExecute", "PreferNoSchedule"), "must be a taint's effect"),
    ]


@dataclass
class MachinesConfig:
    """On which machines pods may run."""

    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[TolerationConfig] = field(default_factory=list)
    priority_class: str = ""  # of pods; "" = the cluster's default


@dataclass
class HeadConfig(MachinesConfig):
    """The head has no actors of ours: it runs Ray's services, the autoscaler and the job's own process."""

    cpus: int = 4
    memory_gib: int = 16

    CHECKS: ClassVar[list[Check]] = [
        ("cpus", lambda v: v >= 2, "must be at least 2"),
        ("memory_gib", lambda v: v >= 8, "must be at least 8"),
    ]


@dataclass
class CpuPodsConfig(MachinesConfig):
    cpus: int = 8  # of a pod
    memory_gib: int = 32
    task_pods: int = 1  # of an autoscaled group, beside what its actors need: for tasks such as reading pictures

    CHECKS: ClassVar[list[Check]] = [
        ("cpus", lambda v: v >= 1, "must be at least 1"),
        ("memory_gib", lambda v: v >= 4, "must be at least 4"),
        ("task_pods", lambda v: v >= 1, "must be at least 1"),
    ]


@dataclass
class GpuPodsConfig(MachinesConfig):
    resource: str = "nvidia.com/gpu"  # what a pod asks Kubernetes for
    per_pod: int = 8  # of the warm-up and of the interactive cluster, at most; other stages say it themselves
    cpus_per_gpu: int = 8
    memory_gib_per_gpu: int = 96

    CHECKS: ClassVar[list[Check]] = [
        ("resource", lambda v: v.endswith("gpu"), "must be a GPU's resource, such as nvidia.com/gpu: KubeRay knows it"),
        ("per_pod", lambda v: v >= 1, "must be at least 1"),
        ("cpus_per_gpu", lambda v: v >= 1, "must be at least 1"),
        ("memory_gib_per_gpu", lambda v: v >= 8, "must be at least 8"),
    ]


@dataclass
class QueueConfig:
    """Who admits warm-up and GRPO, whose pods start all or not at all."""

    kind: str = "none"  # "kueue" or "volcano"
    name: str = ""  # Kueue's LocalQueue, Volcano's Queue

    CHECKS: ClassVar[list[Check]] = [
        ("kind", lambda v: v in ("none", "kueue", "volcano"), "must be none, kueue or volcano"),
    ]

    def relations(self) -> Iterator[str]:
        if self.kind != "none" and not self.name:
            yield f"name = '': kind = {self.kind!r} needs the name of a queue"


@dataclass
class JobsConfig:
    """What becomes of a job that waits, fails or hangs."""

    retries: int = 2  # with a new cluster each; the stage goes on where it was
    deadline_s: int = 7 * 24 * 3600  # of a job, retries included
    start_deadline_s: int = 4 * 3600  # until its pods are there
    keep_s: int = 60  # the pods of a finished job stay that long; its record and its logs on the storage stay
    stop_s: int = 300  # for the step under way and its checkpoint when the job or its head is stopped
    idle_timeout_s: int = 600  # until an autoscaled pod goes; an engine takes minutes to start

    CHECKS: ClassVar[list[Check]] = [
        ("retries", lambda v: v >= 0, "must be 0 or more"),
        *((key, lambda v: v > 0, "must be positive") for key in ("deadline_s", "start_deadline_s", "keep_s")),
        ("stop_s", lambda v: v >= 120, "must be at least 120: a stage that is stopped ends its step"),
        ("idle_timeout_s", lambda v: v >= 300, "must be at least 300: an engine takes minutes to start"),
    ]


@dataclass
class StageEntry:
    """A stage to render. `pods` of it are worked out from its configuration."""

    config: str = ""  # file with the stage's settings, relative to this file; "" = the defaults
    overrides: list[str] = field(default_factory=list)  # key=value, as on the stage's command line


@dataclass
class ClusterConfig:
    """A cluster and what is to run on it. Tokens and keys are never values here, only names of Secrets."""

    name: str = "sif"  # begins the name of every job
    namespace: str = "sif"
    images: ImagesConfig = field(default_factory=ImagesConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    service_account_annotations: dict[str, str] = field(default_factory=dict)  # a cloud's role for the bucket
    secrets: dict[str, SecretConfig] = field(default_factory=dict)  # by environment variable of every Ray container
    environment: dict[str, str] = field(default_factory=dict)  # of every Ray container; no secrets
    head: HeadConfig = field(default_factory=HeadConfig)
    cpu: CpuPodsConfig = field(default_factory=CpuPodsConfig)
    gpu: GpuPodsConfig = field(default_factory=GpuPodsConfig)
    queue: QueueConfig = field(default_factory=QueueConfig)
    jobs: JobsConfig = field(default_factory=JobsConfig)
    prometheus_namespace: str = "monitoring"  # may read the metrics of every pod
    gateway_namespace: str = "gateway"  # its pods may reach the served port
    operator_namespace: str = "kuberay-system"  # KubeRay asks the heads how their jobs and deployments are
    interactive_gpu_pods: int = 1  # of the RayCluster for notebooks and trials, at most; 0 = CPUs only
    stages: dict[str, StageEntry] = field(default_factory=dict)

    CHECKS: ClassVar[list[Check]] = [
        (
            "name",
            lambda v: re.fullmatch(_NAME, v) and len(v) <= _MAX_PREFIX,
            f"must be small letters, digits and -, beginning with a letter, at most {_MAX_PREFIX} characters",
        ),
        ("namespace", lambda v: re.fullmatch(_NAME, v), "must be small letters, digits and -"),
        (
            "stages",
            lambda v: set(v) <= set(RENDERED_STAGES),
            f"may have {', '.join(RENDERED_STAGES)}; the quickstart runs on one machine",
        ),
        ("interactive_gpu_pods", lambda v: v >= 0, "must be 0 (CPUs only) or more"),
    ]

    def relations(self) -> Iterator[str]:
        for name in self.environment:
            if looks_secret(name):
                yield f"environment.{name}: a secret by its name; keep it in a Secret and name that under secrets"


def load_cluster(path: str, overrides: tuple[str, ...] = ()) -> ClusterConfig:
    """The validated cluster file. Paths of its stages are made absolute. Raises `ConfigError`."""
    cluster: ClusterConfig = configuration.load_block(ClusterConfig, path, overrides)
    folder = Path(path).parent
    stages = {
        name: replace(entry, config=str(folder / entry.config) if entry.config else "")
        for name, entry in cluster.stages.items()
    }
    return replace(cluster, stages=stages)


def cluster_of_stage(stage: str, path: str, overrides: tuple[str, ...] = ()) -> ClusterConfig:
    """The default cluster with one stage, whose configuration `path` is."""
    if stage not in RENDERED_STAGES:
        raise ConfigError(f"--stage {stage}: must be one of {', '.join(RENDERED_STAGES)}")
    cluster: ClusterConfig = configuration.load_block(ClusterConfig, None, overrides)
    return replace(cluster, stages={stage: StageEntry(config=path)})


def load_stage(stage: str, entry: StageEntry) -> Any:
    """The stage's own configuration, as its job would load it."""
    return configuration.load(stage, entry.config or None, entry.overrides)
