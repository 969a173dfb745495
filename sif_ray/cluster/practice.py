"""What we ask of manifests beyond the operator: secrets by reference, nothing exposed, no root, pinned images. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from sif_ray.cluster.config import IMAGE_TAG, RAY_VERSION
from sif_ray.cluster.documents import Document, as_dict, as_list
from sif_ray.cluster.rules import cluster_spec, groups, pod, ray_container
from sif_ray.secret_names import looks_secret

QUEUE_LABELS = ("kueue.x-k8s.io/queue-name", "volcano.sh/queue-name")
HEAD_PORTS = {6379, 8265, 10001}  # GCS, dashboard and jobs, Ray Client: who reaches them runs code
RUNTIME_ENV_KEYS = {
    *("working_dir", "py_modules", "excludes", "env_vars", "pip", "uv", "conda", "py_executable", "image_uri"),
    *("worker_process_setup_hook", "config", "nsight", "mpi", "java_jars", "container"),
}


def faults(document: Document) -> Iterator[str]:
    """Everything that is not as it should be in one object."""
    for rule in _EVERY:
        yield from rule(document)
    cluster = cluster_spec(document)
    if cluster is not None:
        for cluster_rule in _CLUSTER:
            yield from cluster_rule(document, cluster)


# --- every object ----------------------------------------------------------------------------------------------------


def literal_secrets(document: Document) -> Iterator[str]:
    """Values of variables whose names say that they are secret."""
    for item in _env_entries(document.body):
        name = str(item.get("name"))
        if looks_secret(name) and item.get("value"):
            yield f"{name} is written out; keep it in a Secret and name that with valueFrom.secretKeyRef"


def _env_entries(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "env":
                yield from (as_dict(item) for item in as_list(inner))
            else:
                yield from _env_entries(inner)
    for inner in as_list(value):
        yield from _env_entries(inner)


def stored_secrets(document: Document) -> Iterator[str]:
    if document.kind == "Secret" and any(
        value for key in ("data", "stringData") for value in as_dict(document.body.get(key)).values()
    ):
        yield "a Secret with its value in a file; leave the value empty and fill it in a copy that nobody commits"
    if document.kind == "ConfigMap":
        for key, value in as_dict(document.body.get("data")).items():
            if looks_secret(str(key)) and value:
                yield f"data.{key} is a secret by its name; keep it in a Secret"


def exposed(document: Document) -> Iterator[str]:
    """Services and ingresses through which strangers reach a head."""
    if document.kind == "Service":
        ports = {as_dict(port).get("port") for port in as_list(document.spec.get("ports"))} & HEAD_PORTS
        if document.spec.get("type") in ("LoadBalancer", "NodePort") and ports:
            kind = document.spec["type"]
            yield f"a {kind} for port {min(ports)} runs anybody's code; write ClusterIP and port-forward"
    if document.kind == "Ingress":
        for port in _backend_ports(document.spec):
            if port in HEAD_PORTS:
                yield f"an Ingress for port {port} runs anybody's code; remove it and port-forward"


def _backend_ports(value: Any) -> Iterator[int]:
    if isinstance(value, dict):
        if "number" in value:
            yield value["number"]
        for inner in value.values():
            yield from _backend_ports(inner)
    for inner in as_list(value):
        yield from _backend_ports(inner)


def runtime_env(document: Document) -> Iterator[str]:
    """Ray stores a runtime environment in the GCS and shows it to everybody."""
    if document.kind != "RayJob":
        return
    try:
        environment = as_dict(yaml.safe_load(str(document.spec.get("runtimeEnvYAML", ""))))
    except yaml.YAMLError:
        return  # said by the operator's rules
    for key in sorted(set(environment) - RUNTIME_ENV_KEYS):
        yield f"runtimeEnvYAML.{key} is no key of Ray's runtime_env; Ray would ignore it"
    for name, value in as_dict(environment.get("env_vars")).items():
        if looks_secret(str(name)):
            yield f"runtimeEnvYAML.env_vars.{name} is shown by the dashboard; use the pods' env with secretKeyRef"
        if not isinstance(value, str):
            yield f"runtimeEnvYAML.env_vars.{name} = {value!r} must be a text; quote it"
    for name in as_dict(document.spec.get("metadata")):
        if looks_secret(str(name)):
            yield f"metadata.{name} is shown by the dashboard; use the pods' env with secretKeyRef"
    for word in _words(document):
        flag, _, value = word.partition("=")
        if looks_secret(flag.replace("api_key_env", "").replace("api_keys_env", "")) and value:
            yield f"the entry point has {flag}=..., which the dashboard shows; use the pods' env with secretKeyRef"


def _words(document: Document) -> list[str]:
    try:
        return shlex.split(str(document.spec.get("entrypoint", "")))
    except ValueError:
        return []  # said where the entry point is read


def queued(document: Document) -> Iterator[str]:
    labels = as_dict(document.metadata.get("labels"))
    label = next((label for label in QUEUE_LABELS if label in labels), None)
    if label and as_dict(cluster_spec(document)).get("enableInTreeAutoscaling"):
        yield f"label {label} with enableInTreeAutoscaling: a queue admits a fixed size; remove one of them"


# --- every cluster ---------------------------------------------------------------------------------------------------


def token_mode(document: Document, cluster: dict[str, Any]) -> Iterator[str]:
    mode = as_dict(cluster.get("authOptions")).get("mode")
    if mode != "token":
        yield f"authOptions.mode is {mode!r}: whoever reaches the head runs code; write token"


def dashboard(document: Document, cluster: dict[str, Any]) -> Iterator[str]:
    head = as_dict(cluster.get("headGroupSpec"))
    service = head.get("serviceType", "ClusterIP")
    service = as_dict(as_dict(head.get("headService")).get("spec")).get("type", service)
    if service != "ClusterIP":
        yield f"the head's service is a {service}: its dashboard runs code; write ClusterIP and port-forward"
    if head.get("enableIngress"):
        yield "enableIngress exposes the dashboard, which runs code; remove it and port-forward"


def versions(document: Document, cluster: dict[str, Any]) -> Iterator[str]:
    if str(cluster.get("rayVersion")) != RAY_VERSION:
        yield f"rayVersion {cluster.get('rayVersion')!r} is not the pinned {RAY_VERSION}; write that"
    for name, group in groups(cluster):
        image = str(ray_container(group).get("image", ""))
        tag = image.rpartition(":")[2] if ":" in image.rpartition("/")[2] else ""
        if "@" in image:
            continue  # a digest is as exact as can be
        if IMAGE_TAG not in tag:
            yield f"group {name}: image {image!r} is not of this code and its Ray; its tag must have {IMAGE_TAG}"
            continue
        wanted = "-gpu" if gpus(group) else "-cpu"
        if not tag.removeprefix(IMAGE_TAG).startswith(wanted):
            yield f"group {name} has {gpus(group)} GPUs and image {image!r}; take the one that ends in {wanted}"


def security(document: Document, cluster: dict[str, Any]) -> Iterator[str]:
    for name, group in groups(cluster):
        of_pod, container = as_dict(pod(group).get("securityContext")), ray_container(group)
        of_container = as_dict(container.get("securityContext"))
        if not of_container.get("runAsNonRoot", of_pod.get("runAsNonRoot")):
            yield f"group {name} may run as root; set securityContext.runAsNonRoot: true"
        if of_container.get("allowPrivilegeEscalation") is not False or of_container.get("privileged"):
            yield f"group {name} may gain privileges; set securityContext.allowPrivilegeEscalation: false"
        if "ALL" not in as_list(as_dict(of_container.get("capabilities")).get("drop")):
            yield f"group {name} keeps capabilities; set securityContext.capabilities.drop: [ALL]"
        if not as_dict(of_container.get("seccompProfile", of_pod.get("seccompProfile"))):
            yield f"group {name} has no seccomp profile; set securityContext.seccompProfile.type: RuntimeDefault"
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            if pod(group).get(key):
                yield f"group {name}: {key} opens the machine to the pod; remove it"


def service_account_token(document: Document, cluster: dict[str, Any]) -> Iterator[str]:
    scaled = cluster.get("enableInTreeAutoscaling")
    for name, group in groups(cluster):
        mounted = pod(group).get("automountServiceAccountToken", True)
        if name == "head" and scaled and not mounted:
            yield "the head's autoscaler needs automountServiceAccountToken: true, to ask for pods"
        elif mounted and not (name == "head" and scaled):
            yield f"group {name} gets a token of the API server; set automountServiceAccountToken: false"


def resources(document: Document, cluster: dict[str, Any]) -> Iterator[str]:
    for name, group in groups(cluster):
        asked = as_dict(ray_container(group).get("resources"))
        requests, limits = as_dict(asked.get("requests")), as_dict(asked.get("limits"))
        for key in sorted({"memory", *(key for key in (*requests, *limits) if key.endswith("/gpu"))}):
            if key not in limits or str(requests.get(key, limits.get(key))) != str(limits.get(key)):
                asked_for, limit = requests.get(key), limits.get(key)
                yield f"group {name}: {key} is requested as {asked_for} and limited to {limit}; make them equal"
        if not requests.get("cpu") and not limits.get("cpu"):
            yield f"group {name} requests no CPU; KubeRay tells Ray the number from it"


def shared_memory(document: Document, cluster: dict[str, Any]) -> Iterator[str]:
    for name, group in groups(cluster):
        mounts = {as_dict(mount).get("mountPath"): as_dict(mount).get("name") for mount in _mounts(group)}
        volume = next(
            (v for v in as_list(pod(group).get("volumes")) if as_dict(v).get("name") == mounts.get("/dev/shm")), {}
        )
        if as_dict(as_dict(volume).get("emptyDir")).get("medium") != "Memory":
            yield f"group {name} has 64 MiB of /dev/shm for the object store; mount an emptyDir of medium Memory"


def _mounts(group: dict[str, Any]) -> list[Any]:
    return as_list(ray_container(group).get("volumeMounts"))


def metrics_port(document: Document, cluster: dict[str, Any]) -> Iterator[str]:
    for name, group in groups(cluster):
        if not any(as_dict(port).get("name") == "metrics" for port in as_list(ray_container(group).get("ports"))):
            yield f"group {name} has no port named metrics, which the PodMonitor reads; add 8080"


def head_without_work(document: Document, cluster: dict[str, Any]) -> Iterator[str]:
    head = as_dict(cluster.get("headGroupSpec"))
    if str(as_dict(head.get("rayStartParams")).get("num-cpus")) != "0":
        yield 'actors may be put on the head, whose end is the end of all; set its rayStartParams.num-cpus to "0"'
    if gpus(head):
        yield "the head has GPUs that no actor uses; remove them"


def idle_timeout(document: Document, cluster: dict[str, Any]) -> Iterator[str]:
    options = as_dict(cluster.get("autoscalerOptions"))
    if cluster.get("enableInTreeAutoscaling") and options.get("idleTimeoutSeconds", 60) < 300:
        yield "autoscalerOptions.idleTimeoutSeconds below 300: an engine takes minutes to start and would go again"


def environment(document: Document, cluster: dict[str, Any]) -> Iterator[str]:
    """One setting for all: Serve's proxies and replicas must agree."""
    values = {
        name: {
            str(as_dict(item).get("name")): as_dict(item).get("value")
            for item in as_list(ray_container(group).get("env"))
        }
        for name, group in groups(cluster)
    }
    head = values.get("head", {})
    for name, of_group in values.items():
        for key in sorted(set(head) ^ set(of_group)):
            if key.startswith("RAY_"):
                yield f"{key} is not set alike in the head and in group {name}; set it in both"


def gpus(group: dict[str, Any]) -> int:
    """GPUs of a pod."""
    limits = as_dict(as_dict(ray_container(group).get("resources")).get("limits"))
    return sum(int(count) for key, count in limits.items() if key.endswith("/gpu") and re.fullmatch(r"\d+", str(count)))


_EVERY: tuple[Callable[[Document], Iterator[str]], ...] = (
    literal_secrets,
    stored_secrets,
    exposed,
    runtime_env,
    queued,
)
_CLUSTER: tuple[Callable[[Document, dict[str, Any]], Iterator[str]], ...] = (
    token_mode,
    dashboard,
    versions,
    security,
    service_account_token,
    resources,
    shared_memory,
    metrics_port,
    head_without_work,
    idle_timeout,
    environment,
)
