"""What KubeRay's operator refuses although the schema allows it. Pure; each rule is one function.

Source: `ray-operator/controllers/ray/utils/validation.go` of KubeRay 1.7.0, and the CEL rules of its CRDs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import yaml

from sif_ray.cluster.documents import Document, as_dict, as_list

MAX_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47, "RayCronJob": 36}
MIN_RAY_FOR_TOKENS, MIN_RAY_FOR_K8S_TOKENS = (2, 52, 0), (2, 55, 0)
RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
AUTOSCALER_V2_ENV = "RAY_enable_autoscaler_v2"
FT_ANNOTATIONS = ("ray.io/ft-enabled", "ray.io/external-storage-namespace")
SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
DELETION_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
UPGRADES = {
    "RayCluster": ("Recreate", "None"),
    "RayService": ("NewCluster", "NewClusterWithIncrementalUpgrade", "None"),
}


def faults(document: Document) -> Iterator[str]:
    """Everything the operator would refuse in a ray.io object; nothing for other kinds."""
    if document.kind in MAX_NAME:
        yield from name(document)
        for rule in _RULES.get(document.kind, ()):
            yield from rule(document)
        cluster = cluster_spec(document)
        if cluster is not None:
            for cluster_rule in _CLUSTER_RULES:
                yield from cluster_rule(document, cluster)


def cluster_spec(document: Document) -> dict[str, Any] | None:
    """The RayClusterSpec in a RayCluster, RayJob or RayService; None without one."""
    key = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}.get(document.kind)
    if document.kind == "RayCluster":
        return document.spec
    return as_dict(document.spec[key]) if key and key in document.spec else None


def groups(cluster: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, group): the head first, then the workers."""
    yield "head", as_dict(cluster.get("headGroupSpec"))
    for group in as_list(cluster.get("workerGroupSpecs")):
        yield str(as_dict(group).get("groupName", "?")), as_dict(group)


def pod(group: dict[str, Any]) -> dict[str, Any]:
    """The pod's spec in a group."""
    return as_dict(as_dict(group.get("template")).get("spec"))


def ray_container(group: dict[str, Any]) -> dict[str, Any]:
    """The first container, which the operator takes for Ray's."""
    containers = as_list(pod(group).get("containers"))
    return as_dict(containers[0]) if containers else {}


def env_names(group: dict[str, Any]) -> set[str]:
    return {str(as_dict(item).get("name")) for item in as_list(ray_container(group).get("env"))}


def name(document: Document) -> Iterator[str]:
    longest = MAX_NAME[document.kind]
    if len(document.name) > longest:
        yield f"the name has {len(document.name)} characters; a {document.kind} may have {longest}"
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", document.name):
        yield f"the name {document.name!r} is no DNS-1035 label; use small letters, digits and -, a letter first"


# --- every cluster ---------------------------------------------------------------------------------------------------


def containers(document: Document, cluster: dict[str, Any]) -> Iterator[str]:
    for group_name, group in groups(cluster):
        if not ray_container(group):
            yield f"group {group_name} has no container; add Ray's as the first"


def group_names(document: Document, cluster: dict[str, Any]) -> Iterator[str]:
    names = [group_name for group_name, _ in groups(cluster)][1:]
    for twice in sorted({one for one in names if names.count(one) > 1}):
        yield f"two groups are named {twice}; rename one"


def resources_twice(document: Document, cluster: dict[str, Any]) -> Iterator[str]:
    for group_name, group in groups(cluster):
        params = [key for key in RESOURCE_PARAMS if as_dict(group.get("rayStartParams")).get(key)]
        if params and group.get("resources"):
            yield f"group {group_name} has resources and rayStartParams {', '.join(params)}; keep one of them"


def start_labels(document: Document, cluster: dict[str, Any]) -> Iterator[str]:
    for group_name, group in groups(cluster):
        if "labels" in as_dict(group.get("rayStartParams")):
            yield f"group {group_name}: rayStartParams.labels is not supported; use the group's labels"


def label_syntax(document: Document, cluster: dict[str, Any]) -> Iterator[str]:
    value_form = r"([A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?)?"
    key_form = r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?"
    for group_name, group in groups(cluster):
        for key, value in as_dict(group.get("labels")).items():
            if not re.fullmatch(key_form, str(key)) or not re.fullmatch(value_form, str(value)):
                yield f"group {group_name}: {key}={value} is no Kubernetes label; use letters, digits and - _ ."


def replica_range(document: Document, cluster: dict[str, Any]) -> Iterator[str]:
    for group_name, group in list(groups(cluster))[1:]:
        fewest, most, start = (group.get(key) for key in ("minReplicas", "maxReplicas", "replicas"))
        if not cluster.get("enableInTreeAutoscaling") and (fewest is None or most is None):
            yield f"group {group_name} needs minReplicas and maxReplicas, as autoscaling is off; set both"
        if isinstance(fewest, int) and isinstance(most, int) and fewest > most:
            yield f"group {group_name}: minReplicas {fewest} is above maxReplicas {most}; lower it or raise the other"
        if isinstance(start, int) and isinstance(most, int) and start > most:
            yield f"group {group_name}: replicas {start} is above maxReplicas {most}; lower it or raise the other"
        if isinstance(start, int) and isinstance(fewest, int) and start < fewest:
            yield f"group {group_name}: replicas {start} is below minReplicas {fewest}; raise it or lower the other"


def autoscaler(document: Document, cluster: dict[str, Any]) -> Iterator[str]:
    scaled, options = bool(cluster.get("enableInTreeAutoscaling")), as_dict(cluster.get("autoscalerOptions"))
    has_env = AUTOSCALER_V2_ENV in env_names(as_dict(cluster.get("headGroupSpec")))
    if not scaled:
        if has_env:
            yield f"{AUTOSCALER_V2_ENV} needs enableInTreeAutoscaling: true; set it or remove the variable"
        if options:
            yield "autoscalerOptions without enableInTreeAutoscaling do nothing; set it or remove them"
        for group_name, group in list(groups(cluster))[1:]:
            for key in ("idleTimeoutSeconds", "priority"):
                if key in group:
                    yield f"group {group_name}: {key} needs enableInTreeAutoscaling: true; set it or remove the key"
        return
    if has_env and options.get("version"):
        yield f"autoscalerOptions.version and {AUTOSCALER_V2_ENV} are both set; keep the version"
    for group_name, group in groups(cluster):
        if options.get("version", "v2") == "v2" and pod(group).get("restartPolicy") not in (None, "Never"):
            yield f"group {group_name}: restartPolicy {pod(group)['restartPolicy']} with autoscaler v2; write Never"
        if group.get("suspend"):
            yield f"group {group_name}: suspend is refused with autoscaling; remove it"


def fault_tolerance(document: Document, cluster: dict[str, Any]) -> Iterator[str]:
    head, options = as_dict(cluster.get("headGroupSpec")), cluster.get("gcsFaultToleranceOptions")
    names, params = env_names(head), as_dict(head.get("rayStartParams"))
    if options is None:
        if "RAY_REDIS_ADDRESS" in names:
            yield "RAY_REDIS_ADDRESS without gcsFaultToleranceOptions; name the address there"
    else:
        for variable in sorted({"RAY_REDIS_ADDRESS", "REDIS_PASSWORD"} & names):
            yield f"{variable} beside gcsFaultToleranceOptions; name it there only"
        if "redis-password" in params:
            yield "rayStartParams.redis-password beside gcsFaultToleranceOptions; name it there only"
        for annotation in FT_ANNOTATIONS:
            if annotation in as_dict(document.metadata.get("annotations")):
                yield f"annotation {annotation} beside gcsFaultToleranceOptions; remove it"
        if "storage" in as_dict(options) and as_dict(options).get("backend") != "rocksdb":
            yield "gcsFaultToleranceOptions.storage needs backend: rocksdb; set it or remove the storage"
    if "REDIS_USERNAME" in names or "redis-username" in params:
        yield "the name of a Redis user belongs into gcsFaultToleranceOptions.redisUsername; move it"


def authentication(document: Document, cluster: dict[str, Any]) -> Iterator[str]:
    options = as_dict(cluster.get("authOptions"))
    if options.get("mode") == "token" and _version(cluster) < MIN_RAY_FOR_TOKENS:
        yield f"authOptions.mode token needs rayVersion 2.52.0 or later, not {cluster.get('rayVersion')!r}; set it"
    if options.get("enableK8sTokenAuth"):
        if _version(cluster) < MIN_RAY_FOR_K8S_TOKENS:
            yield f"enableK8sTokenAuth needs rayVersion 2.55.0 or later, not {cluster.get('rayVersion')!r}; set it"
        if options.get("secretName"):
            yield "enableK8sTokenAuth and secretName exclude each other; keep one"
        if document.kind != "RayCluster":
            yield f"enableK8sTokenAuth is refused for a {document.kind}; remove it"


def _version(cluster: dict[str, Any]) -> tuple[int, ...]:
    parts = re.findall(r"\d+", str(cluster.get("rayVersion") or ""))
    return tuple(int(part) for part in parts[:3])


def nested_upgrade(document: Document, cluster: dict[str, Any]) -> Iterator[str]:
    strategy = as_dict(cluster.get("upgradeStrategy"))
    if document.kind != "RayCluster" and strategy:
        yield f"upgradeStrategy inside the cluster of a {document.kind} is refused; remove it"
    elif strategy and strategy.get("type") not in UPGRADES["RayCluster"]:
        yield f"upgradeStrategy.type {strategy.get('type')!r}: write {' or '.join(UPGRADES['RayCluster'])}"


def network_policy(document: Document, cluster: dict[str, Any]) -> Iterator[str]:
    if cluster.get("networkPolicy"):
        yield "networkPolicy needs an alpha gate of the operator (RayClusterNetworkPolicy); write a NetworkPolicy"


# --- RayJob ----------------------------------------------------------------------------------------------------------


def selector_or_cluster(document: Document) -> Iterator[str]:
    spec = document.spec
    if bool(spec.get("clusterSelector")) == ("rayClusterSpec" in spec):
        yield "exactly one of rayClusterSpec and clusterSelector must be set"
    if spec.get("clusterSelector"):
        if not as_dict(spec["clusterSelector"]).get("ray.io/cluster"):
            yield "clusterSelector must name the cluster under ray.io/cluster"
        for key, refused in (
            ("suspend", spec.get("suspend")),
            ("backoffLimit above 0", spec.get("backoffLimit")),
            ("SidecarMode", spec.get("submissionMode") == "SidecarMode"),
        ):
            if refused:
                yield f"clusterSelector excludes {key}; remove one of them"


def shutdown(document: Document) -> Iterator[str]:
    spec = document.spec
    if spec.get("shutdownAfterJobFinishes"):
        return
    for key in ("ttlSecondsAfterFinished", "suspend"):
        if spec.get(key):
            yield f"{key} needs shutdownAfterJobFinishes: true; set it"


def submission(document: Document) -> Iterator[str]:
    spec = document.spec
    mode = spec.get("submissionMode", SUBMISSION_MODES[0])
    if mode not in SUBMISSION_MODES:
        yield f"submissionMode {mode!r}: write one of {', '.join(SUBMISSION_MODES)}"
    if mode == "InteractiveMode" and spec.get("backoffLimit"):
        yield "InteractiveMode excludes backoffLimit above 0; remove one of them"
    if mode == "SidecarMode":
        for key in ("submitterPodTemplate", "submitterConfig"):
            if key in spec:
                yield f"SidecarMode excludes {key}; remove one of them"
        head = as_dict(as_dict(spec.get("rayClusterSpec")).get("headGroupSpec"))
        if pod(head).get("restartPolicy") not in (None, "Never"):
            yield "SidecarMode needs the head's restartPolicy Never; write it"


def deadlines(document: Document) -> Iterator[str]:
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        value = document.spec.get(key)
        if isinstance(value, int) and value <= 0:
            yield f"{key} = {value} must be positive; remove it for none"
    for key in ("backoffLimit", "ttlSecondsAfterFinished"):
        value = document.spec.get(key)
        if isinstance(value, int) and value < 0:
            yield f"{key} = {value} must be 0 or more"


def runtime_env_yaml(document: Document) -> Iterator[str]:
    text = document.spec.get("runtimeEnvYAML", "")
    try:
        parsed = yaml.safe_load(str(text))
    except yaml.YAMLError as error:
        yield f"runtimeEnvYAML is no YAML: {' '.join(str(error).split())}"
        return
    if parsed is not None and not isinstance(parsed, dict):
        yield "runtimeEnvYAML must be a mapping of Ray's runtime_env"


def managed_by(document: Document) -> Iterator[str]:
    value = document.spec.get("managedBy")
    if value not in (None, "ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"):
        yield f"managedBy {value!r}: write ray.io/kuberay-operator or kueue.x-k8s.io/multikueue"


def deletion(document: Document) -> Iterator[str]:
    spec = document.spec
    strategy = as_dict(spec.get("deletionStrategy"))
    if not strategy:
        return
    rules = [as_dict(rule) for rule in as_list(strategy.get("deletionRules"))]
    old = [as_dict(strategy[key]).get("policy") for key in ("onSuccess", "onFailure") if key in strategy]
    scaled = as_dict(spec.get("rayClusterSpec")).get("enableInTreeAutoscaling")
    policies = {*old, *(rule.get("policy") for rule in rules)}
    if rules and spec.get("shutdownAfterJobFinishes"):
        yield "deletionRules exclude shutdownAfterJobFinishes; remove one of them"
    if (rules and old) or (not rules and len(old) != 2):
        yield "deletionStrategy takes deletionRules, or onSuccess and onFailure, and not both"
    if "DeleteWorkers" in policies and scaled:
        yield "DeleteWorkers is refused with autoscaling; write DeleteCluster"
    if spec.get("clusterSelector") and policies & {"DeleteCluster", "DeleteWorkers"}:
        yield "clusterSelector excludes DeleteCluster and DeleteWorkers; the cluster is another's"
    if "DeleteNone" in old and spec.get("shutdownAfterJobFinishes"):
        yield "DeleteNone contradicts shutdownAfterJobFinishes; remove one of them"
    yield from _deletion_order(rules)


def _deletion_order(rules: list[dict[str, Any]]) -> Iterator[str]:
    ttls: dict[Any, dict[str, int]] = {}
    for rule in rules:
        condition, policy = as_dict(rule.get("condition")), str(rule.get("policy"))
        states = [condition[key] for key in ("jobStatus", "jobDeploymentStatus") if key in condition]
        if len(states) != 1:
            yield "a condition of deletionRules has either jobStatus or jobDeploymentStatus; write one"
            continue
        of_state = ttls.setdefault(states[0], {})
        if policy in of_state:
            yield f"deletionRules has {policy} for {states[0]} twice; remove one"
        of_state[policy] = condition.get("ttlSeconds", 0)
    for state, of_state in ttls.items():
        for before, after in pairwise(policy for policy in DELETION_ORDER if policy in of_state):
            if of_state[before] > of_state[after]:
                yield f"deletionRules for {state}: {after} comes before {before}; workers, cluster, job is the order"


# --- RayService ------------------------------------------------------------------------------------------------------


def upgrade(document: Document) -> Iterator[str]:
    strategy = as_dict(document.spec.get("upgradeStrategy"))
    kind = strategy.get("type")
    if strategy and kind not in (None, *UPGRADES["RayService"]):
        yield f"upgradeStrategy.type {kind!r}: write one of {', '.join(UPGRADES['RayService'])}"
    if kind != "NewClusterWithIncrementalUpgrade":
        return
    options = as_dict(strategy.get("clusterUpgradeOptions"))
    step, surge = options.get("stepSizePercent", 0), options.get("maxSurgePercent", 100)
    if not as_dict(document.spec.get("rayClusterConfig")).get("enableInTreeAutoscaling"):
        yield "NewClusterWithIncrementalUpgrade needs enableInTreeAutoscaling: true; set it"
    if not options.get("gatewayClassName"):
        yield "NewClusterWithIncrementalUpgrade needs clusterUpgradeOptions.gatewayClassName; name one"
    if not 0 < step <= surge <= 100:
        yield f"stepSizePercent {step} and maxSurgePercent {surge}: 0 < step <= surge <= 100 must hold"
    if options.get("intervalSeconds", 0) <= 0:
        yield "clusterUpgradeOptions.intervalSeconds must be positive"


def service_fields(document: Document) -> Iterator[str]:
    for key in ("serviceUnhealthySecondThreshold", "deploymentUnhealthySecondThreshold"):
        if key in document.spec:
            yield f"{key} does nothing any more; remove it"
    delay = document.spec.get("rayClusterDeletionDelaySeconds", 0)
    if isinstance(delay, int) and delay < 0:
        yield f"rayClusterDeletionDelaySeconds = {delay} must be 0 or more"
    head = as_dict(as_dict(document.spec.get("rayClusterConfig")).get("headGroupSpec"))
    if as_dict(as_dict(head.get("headService")).get("metadata")).get("name"):
        yield "headService.metadata.name must not be set in a RayService: each of its clusters needs one"
    timeout = as_dict(document.metadata.get("annotations")).get("ray.io/initializing-timeout")
    if timeout is not None and not re.fullmatch(r"[1-9]\d*|([1-9]\d*(\.\d+)?(h|m|s|ms))+", str(timeout)):
        yield f"annotation ray.io/initializing-timeout = {timeout!r}: write a duration such as 30m"


_Rule = Callable[[Document], Iterator[str]]
_RULES: dict[str, tuple[_Rule, ...]] = {
    "RayCluster": (managed_by,),
    "RayJob": (
        selector_or_cluster,
        shutdown,
        submission,
        deadlines,
        runtime_env_yaml,
        managed_by,
        deletion,
    ),
    "RayService": (upgrade, service_fields, managed_by),
}
_CLUSTER_RULES: tuple[Callable[[Document, dict[str, Any]], Iterator[str]], ...] = (
    containers,
    group_names,
    resources_twice,
    start_labels,
    label_syntax,
    replica_range,
    autoscaler,
    fault_tolerance,
    authentication,
    nested_upgrade,
    network_policy,
)
