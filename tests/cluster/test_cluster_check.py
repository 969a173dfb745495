"""Manifests that were broken on purpose, each refused with its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cluster_manifests import NO_SCHEMAS, as_manifests, crds, found_in, get, manifests_of

from sif_ray import cli
from sif_ray.cluster.documents import Document, Manifests, read
from sif_ray.config import ConfigError

GONE = object()
CLUSTER = "spec.rayClusterSpec"
LEARNER = f"{CLUSTER}.workerGroupSpecs.0"
HEAD_POD = f"{CLUSTER}.headGroupSpec.template.spec"
HEAD = f"{HEAD_POD}.containers.0"
GRPO, GENERATE, SERVE, INTERACTIVE = (
    "RayJob/sif-grpo",
    "RayJob/sif-generate",
    "RayService/sif-serve",
    "RayCluster/sif-interactive",
)


def swap(old: str, new: str) -> Callable[[str], str]:
    def edit(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return edit


def merge(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda found: found | values


def append(*items: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda found: [*found, *items]


def without(name: str) -> Callable[[list[Any]], list[Any]]:
    def edit(found: list[Any]) -> list[Any]:
        kept = [item for item in found if item["name"] != name]
        assert len(kept) < len(found)
        return kept

    return edit


def edited(body: dict[str, Any], path: str, change: Any) -> None:
    """Set, change or remove what stands at a dotted path ("\\." is a dot in a key)."""
    keys = [key.replace("\0", ".") for key in path.replace("\\.", "\0").split(".")]
    *parents, last = [int(key) if key.isdigit() else key for key in keys]
    for key in parents:
        body = body[key]
    if change is GONE:
        del body[last]
    elif callable(change):
        body[last] = change(body.get(last) if isinstance(body, dict) else body[last])
    else:
        body[last] = change


# ruff: noqa: E501
# what, object, path, change, words of the finding
BROKEN: list[tuple[str, str, str, Any, str]] = [
    # the operator's rules
    ("long name", GRPO, "metadata.name", "sif-" + "x" * 44, "the name has 48 characters; a RayJob may have 47"),
    ("bad name", GRPO, "metadata.name", "Sif_grpo", "no DNS-1035 label"),
    ("group labels as start parameter", GRPO, f"{LEARNER}.rayStartParams", merge(labels="a=b"), "rayStartParams.labels"),
    ("resources twice", GRPO, f"{LEARNER}.resources", {"CPU": "8"}, "group learner has resources and rayStartParams"),
    ("bad label", GRPO, f"{LEARNER}.labels", merge(role="a b"), "role=a b is no Kubernetes label"),
    ("no maximum", GRPO, f"{LEARNER}.maxReplicas", GONE, "needs minReplicas and maxReplicas"),
    ("minimum above maximum", GRPO, f"{LEARNER}.minReplicas", 2, "minReplicas 2 is above maxReplicas 1"),
    ("restart policy", GENERATE, f"{HEAD_POD}.restartPolicy", "Always", "restartPolicy Always with autoscaler v2"),
    (
        "autoscaler twice",
        GENERATE,
        f"{HEAD}.env",
        append({"name": "RAY_enable_autoscaler_v2", "value": "1"}),
        "autoscalerOptions.version and RAY_enable_autoscaler_v2 are both set",
    ),
    ("priority of a fixed group", GRPO, f"{LEARNER}.priority", 1, "priority needs enableInTreeAutoscaling"),
    ("no version for tokens", GRPO, f"{CLUSTER}.rayVersion", "2.51.0", "token needs rayVersion 2.52.0 or later"),
    ("API server's tokens", GRPO, f"{CLUSTER}.authOptions", merge(enableK8sTokenAuth=True), "refused for a RayJob"),
    ("Redis password", GRPO, f"{CLUSTER}.gcsFaultToleranceOptions", {"storage": {}}, "storage needs backend: rocksdb"),
    (
        "Redis by variable",
        GRPO,
        f"{HEAD}.env",
        append({"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}),
        "RAY_REDIS_ADDRESS without gcsFaultToleranceOptions",
    ),
    ("upgrade inside a job", GRPO, f"{CLUSTER}.upgradeStrategy", {"type": "Recreate"}, "inside the cluster of a RayJob"),
    ("alpha network policy", GRPO, f"{CLUSTER}.networkPolicy", {"mode": "DenyAll"}, "needs an alpha gate"),
    ("ttl without shutdown", GRPO, "spec.shutdownAfterJobFinishes", False, "needs shutdownAfterJobFinishes: true"),
    ("cluster and selector", GRPO, "spec.clusterSelector", {"ray.io/cluster": "a"}, "exactly one of rayClusterSpec"),
    ("no cluster", GRPO, CLUSTER, GONE, "exactly one of rayClusterSpec and clusterSelector"),
    ("unknown submission", GRPO, "spec.submissionMode", "K8sMode", "submissionMode 'K8sMode': write one of"),
    ("retries by hand", GRPO, "spec.submissionMode", "InteractiveMode", "InteractiveMode excludes backoffLimit"),
    ("submitter of a sidecar", GRPO, "spec.submissionMode", "SidecarMode", "SidecarMode excludes submitterPodTemplate"),
    ("no deadline", GRPO, "spec.activeDeadlineSeconds", 0, "activeDeadlineSeconds = 0 must be positive"),
    (
        "deletion out of order",
        GRPO,
        "spec.deletionStrategy",
        {
            "deletionRules": [
                {"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED", "ttlSeconds": 600}},
                {"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED", "ttlSeconds": 60}},
            ]
        },
        "DeleteSelf comes before DeleteCluster",
    ),
    (
        "deletion rules and shutdown",
        GRPO,
        "spec.deletionStrategy",
        {"deletionRules": [{"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED"}}]},
        "deletionRules exclude shutdownAfterJobFinishes",
    ),
    (
        "workers deleted under the autoscaler",
        GENERATE,
        "spec.deletionStrategy",
        {"onSuccess": {"policy": "DeleteWorkers"}, "onFailure": {"policy": "DeleteCluster"}},
        "DeleteWorkers is refused with autoscaling",
    ),
    ("unknown upgrade", SERVE, "spec.upgradeStrategy.type", "BlueGreen", "upgradeStrategy.type 'BlueGreen'"),
    (
        "upgrade without gateway",
        SERVE,
        "spec.upgradeStrategy",
        {"type": "NewClusterWithIncrementalUpgrade", "clusterUpgradeOptions": {"stepSizePercent": 10}},
        "needs clusterUpgradeOptions.gatewayClassName",
    ),
    (
        "upgrade in steps above its surge",
        SERVE,
        "spec.upgradeStrategy",
        {
            "type": "NewClusterWithIncrementalUpgrade",
            "clusterUpgradeOptions": {
                "gatewayClassName": "istio", "stepSizePercent": 50, "maxSurgePercent": 20, "intervalSeconds": 10,
            },
        },
        "0 < step <= surge <= 100 must hold",
    ),
    ("dead field", SERVE, "spec.serviceUnhealthySecondThreshold", 300, "does nothing any more"),
    (
        "name of the head's service",
        SERVE,
        "spec.rayClusterConfig.headGroupSpec.headService",
        {"metadata": {"name": "head"}},
        "headService.metadata.name must not be set",
    ),
    # our own
    ("open control plane", GRPO, f"{CLUSTER}.authOptions.mode", "disabled", "authOptions.mode is 'disabled'"),
    ("authentication without mode", GRPO, f"{CLUSTER}.authOptions", {}, "authOptions.mode is None"),
    ("dashboard for all", GRPO, f"{CLUSTER}.headGroupSpec.serviceType", "LoadBalancer", "service is a LoadBalancer"),
    ("dashboard by ingress", GRPO, f"{CLUSTER}.headGroupSpec.enableIngress", True, "enableIngress exposes"),
    ("another Ray", GRPO, f"{CLUSTER}.rayVersion", "2.61.0", "rayVersion '2.61.0' is not the pinned"),
    ("latest image", GRPO, f"{HEAD}.image", "sif-ray:latest", "group head: image 'sif-ray:latest' is not of this code"),
    ("image without tag", GRPO, f"{HEAD}.image", "localhost:5000/sif-ray", "its tag must have"),
    (
        "CPU image on GPUs",
        GRPO,
        f"{LEARNER}.template.spec.containers.0.image",
        swap("-gpu", "-cpu"),
        "group learner has 8 GPUs and image",
    ),
    (
        "secret written out",
        GRPO,
        f"{HEAD}.env",
        append({"name": "WANDB_API_KEY", "value": "abc"}),
        "WANDB_API_KEY is written out",
    ),
    (
        "secret in the runtime environment",
        GRPO,
        "spec.runtimeEnvYAML",
        "env_vars:\n  HF_TOKEN: hf_abc\n",
        "runtimeEnvYAML.env_vars.HF_TOKEN is shown by the dashboard",
    ),
    ("unknown runtime environment", GRPO, "spec.runtimeEnvYAML", "workingdir: x\n", "workingdir is no key of Ray's"),
    (
        "two package managers",
        GRPO,
        "spec.runtimeEnvYAML",
        "pip: [a]\nconda: b\n",
        "runtimeEnvYAML: ",
    ),
    ("broken runtime environment", GRPO, "spec.runtimeEnvYAML", "a: [b", "runtimeEnvYAML is no YAML"),
    ("secret as argument", GRPO, "spec.entrypoint", lambda line: f"{line} judge.api_key=x", "which the dashboard shows"),
    ("root", GRPO, f"{HEAD_POD}.securityContext", merge(runAsNonRoot=False), "group head may run as root"),
    ("privileges", GRPO, f"{HEAD}.securityContext", merge(allowPrivilegeEscalation=True), "may gain privileges"),
    ("capabilities", GRPO, f"{HEAD}.securityContext.capabilities", GONE, "group head keeps capabilities"),
    ("token of a worker", GRPO, f"{LEARNER}.template.spec.automountServiceAccountToken", True, "token of the API server"),
    ("blind autoscaler", GENERATE, f"{HEAD_POD}.automountServiceAccountToken", False, "autoscaler needs automount"),
    (
        "memory beyond the request",
        GRPO,
        f"{HEAD}.resources.limits.memory",
        "64Gi",
        "memory is requested as 32Gi and limited to 64Gi",
    ),
    ("small shared memory", GRPO, f"{HEAD}.volumeMounts", without("shm"), "group head has 64 MiB of /dev/shm"),
    ("nothing to scrape", GRPO, f"{HEAD}.ports", without("metrics"), "group head has no port named metrics"),
    ("work on the head", GRPO, f"{CLUSTER}.headGroupSpec.rayStartParams.num-cpus", GONE, "actors may be put on the head"),
    (
        "impatient autoscaler",
        GENERATE,
        f"{CLUSTER}.autoscalerOptions.idleTimeoutSeconds",
        60,
        "idleTimeoutSeconds below 300",
    ),
    (
        "queue of a growing job",
        GENERATE,
        "metadata.labels",
        lambda labels: labels | {"kueue.x-k8s.io/queue-name": "gpus"},
        "a queue admits a fixed size",
    ),
    (
        "variables of the head alone",
        SERVE,
        "spec.rayClusterConfig.workerGroupSpecs.0.template.spec.containers.0.env",
        without("RAY_SERVE_ENABLE_HA_PROXY"),
        "RAY_SERVE_ENABLE_HA_PROXY is not set alike in the head and in group depth",
    ),
    ("secret in a file", "ConfigMap/sif-grpo", "data.JUDGE_API_KEY", "abc", "data.JUDGE_API_KEY is a secret by its name"),
    # what stands inside
    ("no such script", GRPO, "spec.entrypoint", swap("jobs/grpo.py", "jobs/train.py"), "jobs/train.py does not exist"),
    ("another program", GRPO, "spec.entrypoint", "bash run.sh", "write python jobs/STAGE.py --config FILE"),
    ("no configuration", GRPO, "spec.entrypoint", "python jobs/grpo.py", "no --config; mount a ConfigMap"),
    ("dry run", GRPO, "spec.entrypoint", lambda line: f"{line} --dry-run", "--dry-run runs nothing"),
    ("configuration elsewhere", GRPO, "spec.entrypoint", swap("/etc/sif_ray", "/etc/sif"), "is not mounted in the head"),
    (
        "configuration of another name",
        "ConfigMap/sif-grpo",
        "data",
        lambda data: {"train.yaml": data["grpo.yaml"]},
        "has no grpo.yaml, which the entry point reads",
    ),
    (
        "unknown key of the stage",
        "ConfigMap/sif-grpo",
        "data.grpo\\.yaml",
        swap("num_engines", "num_engine"),
        "grpo.yaml is no configuration of grpo",
    ),
    (
        "impossible value of the stage",
        "ConfigMap/sif-grpo",
        "data.grpo\\.yaml",
        swap("epochs: 2.0", "epochs: -1"),
        "epochs = -1.0: must be positive",
    ),
    (
        "more engines than GPUs",
        "ConfigMap/sif-grpo",
        "data.grpo\\.yaml",
        swap("num_engines: 8", "num_engines: 24"),
        "do not fit into placement.nodes x placement.gpus_per_node",
    ),
    ("fewer GPUs than ranks", GRPO, "spec.entrypoint", lambda line: f"{line} learner.num_ranks=4", "group learner"),
    (
        "GPUs of a pod",
        GRPO,
        f"{LEARNER}.template.spec.containers.0.resources",
        {"requests": {"cpu": "96", "memory": "1Gi", "nvidia.com/gpu": "4"}, "limits": {"memory": "1Gi", "nvidia.com/gpu": "4"}},
        "group learner has 4 GPUs a pod, and the configuration needs 8",
    ),
    ("CPUs of a pod", GRPO, f"{LEARNER}.rayStartParams.num-cpus", "4", "group learner has 4 CPUs a pod"),
    ("group missing", GRPO, f"{CLUSTER}.workerGroupSpecs", lambda groups: groups[:2], "group judge is missing"),
    ("group too many", GRPO, f"{LEARNER}.groupName", "spare", "group spare is not used by the configuration"),
    ("label of another role", GRPO, f"{LEARNER}.labels", {"sif.role": "rollout"}, "has the label sif.role=rollout"),
    ("gang that grows", GRPO, f"{CLUSTER}.enableInTreeAutoscaling", True, "needs all its pods at once"),
    ("too few depth pods", GENERATE, f"{CLUSTER}.workerGroupSpecs.0.maxReplicas", 2, "group depth grows to 2 pods"),
    (
        "path of a laptop",
        "ConfigMap/sif-grpo",
        "data.grpo\\.yaml",
        swap("/mnt/sif/data/sif", "/home/me/sif"),
        "data = '/home/me/sif' is not on the storage",
    ),
    ("relative path", "ConfigMap/sif-grpo", "data.grpo\\.yaml", swap("/mnt/sif/data/sif", "data/sif"), "data = 'data/sif'"),
    ("a Ray of its own", "ConfigMap/sif-grpo", "data.grpo\\.yaml", swap("address: auto", "address: local"), "ray.address"),
    ("storage of the head alone", GRPO, f"{LEARNER}.template.spec.containers.0.volumeMounts", without("storage"), "does not mount the storage"),
    ("no storage", GRPO, f"{HEAD_POD}.volumes", without("storage"), "mounts no PersistentVolumeClaim"),
    ("no judge's key", GRPO, f"{LEARNER}.template.spec.containers.0.env", without("JUDGE_API_KEY"), "lacks JUDGE_API_KEY"),
    ("unknown key of Serve", SERVE, "spec.serveConfigV2", swap("route_prefix", "route_prefx"), "route_prefx is no key"),
    ("impossible value of Serve", SERVE, "spec.serveConfigV2", swap("EveryNode", "Everywhere"), "serveConfigV2.proxy_location"),
    ("unknown key of ours", SERVE, "spec.serveConfigV2", swap("actors_max", "actor_max"), "serveConfigV2: args: "),
    ("no such application", SERVE, "spec.serveConfigV2", swap("build_app", "make_app"), "does not exist in the image"),
    ("another port", SERVE, "spec.serveConfigV2", swap("port: 8000", "port: 8080"), "port is not 8000"),
    ("more engines than pods", SERVE, "spec.serveConfigV2", swap("actors_max: 4", "actors_max: 8"), "grows to 8 pods, and the"),
    ("broken configuration of Serve", SERVE, "spec.serveConfigV2", "applications: [", "serveConfigV2 is no YAML"),
]  # fmt: skip

# the same, by the schemas
MISSPELT: list[tuple[str, str, str, Any, str]] = [
    ("field of a job", GRPO, "spec.shutdownAfterJobFinish", True, "'shutdownAfterJobFinish' was unexpected"),
    ("field of a group", GRPO, f"{LEARNER}.minReplica", 1, "'minReplica' was unexpected"),
    ("value of an enumeration", GRPO, f"{CLUSTER}.authOptions.mode", "tokens", "'tokens' is not one of"),
    ("type", GRPO, "spec.backoffLimit", "two", "'two' is not of type 'integer'"),
    ("missing template", GRPO, f"{LEARNER}.template", GONE, "'template' is a required property"),
    ("field of a pod", GRPO, f"{HEAD}.imagePullPolcy", "Always", "'imagePullPolcy' was unexpected"),
    ("field of a cluster", INTERACTIVE, "spec.rayVersio", "2.60.0", "'rayVersio' was unexpected"),
    ("field of a service", SERVE, "spec.serveConfig", "", "'serveConfig' was unexpected"),
]
BUILT_IN: list[tuple[str, str, str, Any, str]] = [
    ("field of a policy", "NetworkPolicy/sif-pods", "spec.ingres", [], "'ingres' was unexpected"),
    (
        "claim without size",
        "PersistentVolumeClaim/sif-storage",
        "spec.resources",
        {"size": "1Ti"},
        "'size' was unexpected",
    ),
    ("role without verbs", "Role/sif", "rules.0.verbs", GONE, "'verbs' is a required property"),
    ("unknown version", "ServiceAccount/sif", "apiVersion", "v2", "has no v2 ServiceAccount"),
]


def broken(target: str, path: str, change: Any) -> Manifests:
    """A job with its ConfigMap, or the one object, with the change; without, they have no findings (see below)."""
    kind, name = target.split("/")
    same = manifests_of("production", only=name).documents
    kept = [document for document in same if document.kind in _TOGETHER.get(kind, kind)]
    chosen = Manifests(kept)
    edited(get(chosen, kind, name), path, change)
    return chosen


_TOGETHER = {"RayJob": ("RayJob", "ConfigMap"), "ConfigMap": ("RayJob", "ConfigMap")}


@pytest.mark.parametrize(
    ("target", "path", "change", "words"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN]
)
def test_what_is_broken_is_refused_with_the_reason(target: str, path: str, change: Any, words: str) -> None:
    found = found_in(broken(target, path, change))
    assert any(words in finding for finding in found), found
    assert all(finding.count("\n") == 0 for finding in found)


@pytest.mark.parametrize(
    ("target", "path", "change", "words"), [row[1:] for row in MISSPELT], ids=[row[0] for row in MISSPELT]
)
def test_what_the_custom_resource_definitions_refuse_is_said(target: str, path: str, change: Any, words: str) -> None:
    found = found_in(broken(target, path, change), crds())
    assert any(words in finding and "(schema)" in finding for finding in found), found


@pytest.mark.parametrize(
    ("target", "path", "change", "words"), [row[1:] for row in BUILT_IN], ids=[row[0] for row in BUILT_IN]
)
def test_what_kubernetes_refuses_is_said(target: str, path: str, change: Any, words: str) -> None:
    pytest.importorskip("kubernetes_validate")
    found = found_in(broken(target, path, change))
    assert any(words in finding for finding in found), found


@pytest.mark.parametrize("target", sorted({row[1] for row in (*BROKEN, *MISSPELT, *BUILT_IN)}))
def test_what_is_broken_above_is_whole_before(target: str) -> None:
    assert found_in(broken(target, "metadata.annotations", {})) == []


def test_a_finding_is_one_line_with_place_object_and_reason() -> None:
    (finding,) = found_in(broken(GRPO, f"{CLUSTER}.authOptions.mode", "disabled"))
    assert finding.startswith("jobs/grpo.yaml: RayJob/sif-grpo: authOptions.mode is 'disabled'")
    assert finding.endswith("; write token")


def test_a_service_for_the_head_and_an_ingress_are_found() -> None:
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "head"}}
    service["spec"] = {"type": "NodePort", "ports": [{"port": 8265}]}  # type: ignore[assignment]
    backend = {"service": {"name": "head", "port": {"number": 8265}}}
    rule = {"http": {"paths": [{"path": "/", "pathType": "Prefix", "backend": backend}]}}
    ingress = {"apiVersion": "networking.k8s.io/v1", "kind": "Ingress", "metadata": {"name": "head"}}
    ingress["spec"] = {"rules": [rule]}  # type: ignore[assignment]
    found = found_in(Manifests([Document("a.yaml", service), Document("b.yaml", ingress)]))
    assert [finding.partition(" runs anybody's code")[0] for finding in found] == [
        "a.yaml: Service/head: a NodePort for port 8265",
        "b.yaml: Ingress/head: an Ingress for port 8265",
    ]


def test_a_secret_with_a_value_is_found() -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys"}, "stringData": {"HF_TOKEN": "hf_x"}}
    (finding,) = found_in(Manifests([Document("s.yaml", secret)]))
    assert "a Secret with its value in a file" in finding and "hf_x" not in finding


@pytest.mark.parametrize(
    ("path", "change", "words"),
    [
        (f"{HEAD_POD}.serviceAccountName", "default", "ServiceAccount default is none of sif"),
        (f"{HEAD_POD}.volumes.1.persistentVolumeClaim.claimName", "disk", "PersistentVolumeClaim disk is none of"),
    ],
)
def test_what_a_pod_names_must_be_among_the_files(path: str, change: str, words: str) -> None:
    manifests = manifests_of("production")
    edited(get(manifests, "RayJob", "sif-grpo"), path, change)
    assert any(words in finding for finding in found_in(manifests))


def test_two_objects_of_one_name_are_found() -> None:
    manifests = manifests_of("dev")
    again = [replace(document, path="again.yaml") for document in manifests.documents if document.kind == "RayJob"]
    manifests.documents.extend(again)
    found = found_in(manifests)
    assert len(found) == 2 * len(again) and all("of this kind, namespace and name" in finding for finding in found)


def test_a_job_without_its_configuration_among_the_files_is_found() -> None:
    manifests = manifests_of("dev")
    alone = Manifests([document for document in manifests.documents if document.name == "sif-grpo"][1:])
    (finding,) = found_in(alone)
    assert "ConfigMap sif-grpo, with the job's configuration, is not among the files" in finding


# --- the command -----------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.yaml").write_text("a: [b")
    for name in ("nowhere.yaml", "empty", "broken.yaml"):
        assert cli.main(["cluster", "check", str(tmp_path / name)]) == 2
        assert name in capsys.readouterr().err
    good = tmp_path / "good.yaml"
    good.write_text("apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n")
    assert cli.main(["cluster", "check", str(good), "--crds", str(tmp_path / "empty")]) == 2


def test_the_command_says_every_finding_and_what_was_not_checked(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    file = tmp_path / "job.yaml"
    file.write_text(
        "apiVersion: ray.io/v1\nkind: RayJob\nmetadata: {name: a}\nspec: {entrypoint: python jobs/data.py}\n"
    )
    assert cli.main(["cluster", "check", str(file)]) == 1
    assert (
        capsys.readouterr().out == f"{file}: RayJob/a: exactly one of rayClusterSpec and clusterSelector must be set\n"
    )
    assert sum("schemas of ray.io kinds are not checked" in record.message for record in caplog.records) == 1


def test_keys_that_stand_twice_and_what_is_no_object_are_found(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text(
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\nkind: Namespace\n---\n- a\n---\nmetadata: {}\n"
    )
    found = list(found_in(read([str(file)])))
    assert "key 'kind' stands twice in one mapping" in found[0]
    assert "a list is no Kubernetes object" in found[1]
    assert any("metadata.name is missing" in finding for finding in found[2:])


def test_a_list_is_its_items(tmp_path: Path) -> None:
    file = tmp_path / "list.yaml"
    file.write_text("kind: List\nitems: [{apiVersion: v1, kind: Namespace, metadata: {name: a}}]\n")
    (document,) = read([str(file)]).documents
    assert (document.kind, document.name) == ("Namespace", "a")
    with pytest.raises(ConfigError, match="no such file"):
        read([str(tmp_path / "nowhere")])


def test_hostile_shapes_are_findings_and_no_crashes() -> None:
    for body in (
        {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": [], "spec": []},
        {"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": {"name": "a"}, "spec": {"rayClusterConfig": 3}},
        {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "a"}, "spec": {"workerGroupSpecs": [3]}},
        {"kind": "RayCluster", "metadata": {"name": "a"}},
        {"apiVersion": 3, "kind": 4, "metadata": {"name": 5}},
    ):
        assert found_in(Manifests([Document("hostile.yaml", body)]), NO_SCHEMAS)


def test_rendered_text_is_read_as_it_was_written() -> None:
    assert as_manifests({"a.yaml": "kind: A\nmetadata: {name: b}\n"}).documents[0].where == "a.yaml: A/b"
