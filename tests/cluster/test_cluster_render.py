"""Every configuration becomes manifests that pass the check and agree with it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from cluster_manifests import (
    CLUSTER_FILES,
    ROOT,
    crds,
    found_in,
    get,
    gpus_of,
    manifests_of,
    stage_manifests,
    workers,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sif_ray import cli
from sif_ray.cluster.config import RENDERED_STAGES, StorageConfig, load_cluster
from sif_ray.cluster.groups import Sizes, groups_of
from sif_ray.cluster.manifests import settings as settings_of
from sif_ray.cluster.manifests import stage_configs
from sif_ray.cluster.places import is_hub_id, on_cluster
from sif_ray.config import (
    STAGES,
    ConfigError,
    EngineConfig,
    GrpoConfig,
    LearnerConfig,
    PlacementConfig,
    load,
    load_values,
)
from sif_ray.resources.placement import lay_out
from sif_ray.runtime import SERVE_ENVIRONMENT

PREFIXES = {"eval": "evaluate", "warmup": "warmup", "grpo": "grpo", "serve": "serve", "generate": "generate"}


def stage_of(config: Path) -> str:
    if config.parent.name == "published" and not config.stem.startswith("warmup"):
        return "grpo"
    return next((stage for prefix, stage in PREFIXES.items() if config.stem.startswith(prefix)), "generate")


STAGE_FILES = sorted(
    path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "cluster" and path.stem != "quickstart"
)


@pytest.mark.parametrize("file", CLUSTER_FILES, ids=lambda path: path.stem)
def test_a_cluster_file_renders_without_findings(file: Path) -> None:
    manifests = manifests_of(file.stem)
    kinds = {document.kind for document in manifests.documents}
    assert {"RayJob", "RayService", "RayCluster", "NetworkPolicy", "Role", "Namespace"} <= kinds
    assert found_in(manifests, crds()) == []


@pytest.mark.parametrize(("queue", "bucket"), [("kueue", ""), ("volcano", "s3://bucket/sif")])
def test_queues_and_buckets_render_without_findings(queue: str, bucket: str) -> None:
    overrides = [f"queue.kind={queue}", "queue.name=gpus", *([f"storage.bucket={bucket}"] if bucket else [])]
    manifests = manifests_of("production", *overrides)
    assert found_in(manifests) == []
    labels = get(manifests, "RayJob", "sif-grpo")["metadata"]["labels"]
    assert labels.get("kueue.x-k8s.io/queue-name") == ("gpus" if queue == "kueue" else None)
    assert labels.get("volcano.sh/queue-name") == ("gpus" if queue == "volcano" else None)
    assert "kueue.x-k8s.io/queue-name" not in get(manifests, "RayJob", "sif-generate")["metadata"]["labels"]
    grpo = yaml.safe_load(get(manifests, "ConfigMap", "sif-grpo")["data"]["grpo.yaml"])
    assert grpo["data"] == f"{bucket or '/mnt/sif'}/data/sif"
    assert grpo["policy"].startswith("/mnt/sif/runs/")


@pytest.mark.parametrize("file", STAGE_FILES, ids=lambda path: path.stem)
def test_a_stage_renders_without_findings(file: Path) -> None:
    stage = stage_of(file)
    manifests = stage_manifests(stage, file)
    assert found_in(manifests, crds()) == []


@pytest.mark.parametrize("name", ["production", "dev"])
def test_the_job_reads_the_configuration_that_its_groups_were_made_from(name: str) -> None:
    cluster = load_cluster(str(ROOT / "configs" / "cluster" / f"{name}.yaml"))
    manifests = manifests_of(name)
    for stage, config in stage_configs(cluster).items():
        assert load_values(stage, settings_of(config)) == config
        if stage == "serve":
            continue
        mounted = get(manifests, "ConfigMap", f"sif-{stage}")["data"][f"{stage}.yaml"]
        assert load_values(stage, yaml.safe_load(mounted)) == config
        entrypoint = get(manifests, "RayJob", f"sif-{stage}")["spec"]["entrypoint"].split()
        assert entrypoint == ["python", f"jobs/{stage}.py", "--config", f"/etc/sif_ray/{stage}.yaml"]
        assert (ROOT / entrypoint[1]).is_file()


# --- groups ----------------------------------------------------------------------------------------------------------


def test_published_runs_have_the_gpus_of_their_layout() -> None:
    expected = {
        "3b-colocated": {"learner-rollout": (1, 8)},
        "3b-split": {"learner-rollout": (1, 8)},
        "3b-two-nodes": {"learner": (1, 8), "rollout": (1, 8)},
        "7b-as-released": {"learner-rollout": (1, 8)},
        "7b-colocated": {"learner-rollout": (1, 8)},
        "7b-split": {"learner-rollout": (1, 8)},
        "7b-two-nodes": {"learner": (1, 8), "rollout": (1, 8)},
    }
    for name, groups in expected.items():
        job = get(stage_manifests("grpo", ROOT / "configs/published" / f"{name}.yaml"), "RayJob", "sif-grpo")
        found = {group["groupName"]: (group["replicas"], gpus_of(group)) for group in workers(job)}
        assert found == groups, name
        assert not job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"]
        for group in workers(job):
            assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
            assert group["labels"] == {"sif.role": group["groupName"]}


def test_reward_workers_get_the_machine_that_learner_and_engines_leave_empty() -> None:
    job = get(manifests_of("production"), "RayJob", "sif-grpo")
    assert [(group["groupName"], group["replicas"], gpus_of(group)) for group in workers(job)] == [
        ("learner", 1, 8),
        ("rollout", 1, 8),
        ("judge", 1, 0),
    ]
    images = [group["template"]["spec"]["containers"][0]["image"] for group in workers(job)]
    assert [image.rpartition("-")[2] for image in images] == ["gpu", "gpu", "cpu"]


@settings(max_examples=60, deadline=None)
@given(
    nodes=st.integers(1, 6),
    gpus=st.integers(1, 8),
    ranks=st.integers(1, 12),
    engines=st.integers(1, 12),
    size=st.sampled_from([1, 2, 4]),
    rewards=st.integers(1, 6),
)
def test_the_groups_hold_each_machine_of_a_layout(nodes, gpus, ranks, engines, size, rewards) -> None:
    config = GrpoConfig(
        policy="unknown/policy",
        num_engines=engines,
        num_reward_workers=rewards,
        engine=EngineConfig(num_gpus=float(size), tensor_parallel_size=size),
        learner=LearnerConfig(num_ranks=ranks, num_gpus_per_rank=1.0),
        placement=PlacementConfig(nodes=nodes, gpus_per_node=gpus),
    )
    try:
        layout = lay_out(config)
    except ConfigError:
        return
    groups = {group.name: group for group in groups_of(config, Sizes(1, 1, 1))}
    assert sum(group.most * group.num_gpus for group in groups.values()) == ranks + engines * size
    assert sum(group.most for group in groups.values()) == len(layout.nodes)
    for role, node in zip(layout.roles, layout.nodes, strict=True):
        assert groups[role].num_gpus == sum(bundle.num_gpus for bundle in node)
        assert groups[role].num_cpus == math.ceil(sum(bundle.num_cpus for bundle in node))


@pytest.mark.parametrize(
    ("ranks", "share", "per_pod", "pods"),
    [(8, 1.0, 8, (1, 8)), (16, 1.0, 8, (2, 8)), (12, 1.0, 8, (2, 6)), (8, 0.5, 8, (1, 4)), (7, 1.0, 4, (7, 1))],
)
def test_a_warm_up_has_pods_of_equal_shares(ranks, share, per_pod, pods) -> None:
    overrides = [f"learner.num_ranks={ranks}", f"learner.num_gpus_per_rank={share}"]
    (group,) = groups_of(load("warmup", None, overrides), Sizes(8, 1, per_pod))
    assert (group.fewest, group.most, group.num_gpus) == (pods[0], pods[0], pods[1])


def test_generation_grows_from_nothing_to_its_pools() -> None:
    overrides = [
        "depth_num_gpus=0.25", "depth_actors_max=10", "teacher.kind=vllm", "teacher.model=Qwen/Qwen2.5-VL-7B-Instruct",
        "teacher.engine.num_gpus=2", "teacher.engine.tensor_parallel_size=2", "teacher.engine.max_model_len=16384",
        "teacher.actors_max=3",
    ]  # fmt: skip
    groups = groups_of(load("generate", None, overrides), Sizes(8, 2, 8))
    assert [(group.name, group.fewest, group.most, group.num_gpus) for group in groups] == [
        ("depth", 0, 3, 1),  # four actors share a GPU
        ("teacher", 0, 3, 2),
        ("cpu", 0, 2, 0),
    ]


def test_a_service_has_room_for_two_versions_while_one_is_rolled_out() -> None:
    overrides = ["engine.num_gpus=1", "actors_min=2", "actors_max=4"]
    engines = {group.name: group for group in groups_of(load("serve", None, overrides), Sizes(8, 1, 8))}["engine"]
    assert (engines.fewest, engines.most) == (2, 8)
    in_turn = groups_of(load("serve", None, [*overrides, "max_surge_percent=0"]), Sizes(8, 1, 8))
    assert {group.name: group.most for group in in_turn}["engine"] == 4


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "override", "value"),
    [
        ("grpo", "policy=runs/base", "/mnt/sif/runs/base"),
        ("grpo", "policy=Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("grpo", "policy=toy", "toy"),
        ("grpo", "policy=s3://bucket/policy", "s3://bucket/policy"),
        ("grpo", "policy=/mnt/sif/runs/base", "/mnt/sif/runs/base"),
        ("warmup", "data=data/sif", "/mnt/sif/data/sif"),
        ("generate", "output=gs://bucket/sif", "gs://bucket/sif"),
        ("serve", "depth_cache=runs/depth", "/mnt/sif/runs/depth"),
    ],
)
def test_paths_lead_to_the_storage(stage: str, override: str, value: str) -> None:
    moved = on_cluster(load(stage, None, [override]), StorageConfig())
    assert getattr(moved, override.partition("=")[0]) == value
    assert moved.ray.address == "auto"


@pytest.mark.parametrize(
    ("stage", "override", "words"),
    [
        ("grpo", "policy=/home/me/policy", "policy = '/home/me/policy' is not on the storage"),
        ("grpo", "output=s3://bucket/run", "output = 's3://bucket/run': a run is written to a folder"),
        ("warmup", "data=../data", "data = '../data' leaves the storage"),
        ("warmup", "learner.lora.adapter=~/adapter", "learner.lora.adapter = '~/adapter' leaves the storage"),
        ("evaluate", "checkpoints.a=/scratch/a", "checkpoints.a = '/scratch/a' is not on the storage"),
        ("serve", "api_keys_file=/run/secrets/keys", "set api_keys_env"),
    ],
)
def test_paths_that_pods_do_not_have_are_refused(stage: str, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(").split("; ")[0].replace(".", r"\.")):
        on_cluster(load(stage, None, [override]), StorageConfig())


def test_a_hub_id_is_known_by_its_form() -> None:
    assert is_hub_id("Qwen/Qwen2.5-VL-7B-Instruct") and is_hub_id("depth-anything/Depth-Anything-V2-Small-hf")
    assert not is_hub_id("runs/base") and not is_hub_id("a/b/c") and not is_hub_id("/a/b") and not is_hub_id("toy")


# --- what all pods have ----------------------------------------------------------------------------------------------


def test_variables_of_every_pod_are_those_of_our_own_sessions_and_keys_come_from_secrets() -> None:
    manifests = manifests_of("production")
    service = get(manifests, "RayService", "sif-serve")["spec"]["rayClusterConfig"]
    for group in (service["headGroupSpec"], *service["workerGroupSpecs"]):
        variables = {item["name"]: item for item in group["template"]["spec"]["containers"][0]["env"]}
        for name, value in (SERVE_ENVIRONMENT | {"RAY_SERVE_ENABLE_HA_PROXY": "1"}).items():
            assert variables[name]["value"] == value
        assert variables["SIF_KEYS"]["valueFrom"] == {"secretKeyRef": {"name": "sif-secrets", "key": "SIF_KEYS"}}
        assert "JUDGE_API_KEY" not in variables  # GRPO's alone
    template = get(manifests, "Secret", "sif-secrets")
    assert template["stringData"] == {"HF_TOKEN": "", "JUDGE_API_KEY": "", "SIF_KEYS": ""}


def test_ports_of_judges_are_open() -> None:
    manifests = stage_manifests("grpo", ROOT / "configs/published/7b-split.yaml")
    egress = get(manifests, "NetworkPolicy", "sif-pods")["spec"]["egress"]
    ports = {port["port"] for rule in egress for port in rule.get("ports", [])}
    assert ports == {53, 443, 6443, 8000}


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_what_the_check_accepts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    config, output = str(ROOT / "configs/published/7b-split.yaml"), str(tmp_path / "out")
    assert cli.main(["cluster", "render", "--config", config, "--stage", "grpo", "--output", output]) == 0
    assert cli.main(["cluster", "check", output]) == 0
    assert capsys.readouterr().out.endswith("documents, no findings\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["name=Sif"], "name = 'Sif'"),
        (["images.gpu=sif-ray:latest"], "images.gpu = 'sif-ray:latest': the tag must contain"),
        (["queue.kind=kueue"], "queue.name = ''"),
        (["environment.HF_TOKEN=hf_x"], "environment.HF_TOKEN: a secret by its name"),
        (["jobs.idle_timeout_s=60"], "jobs.idle_timeout_s = 60"),
        (["head.node_selektor.a=b"], "node_selektor"),
        (["stages.quickstart.config=x"], "the quickstart runs on one machine"),
        (["stages.grpo.overrides=[num_engines=9]"], "stages.grpo: "),
        (["stages.grpo.overrides=[output=/scratch]"], "stages.grpo: output = '/scratch' is not on the storage"),
    ],
)
def test_wrong_requests_are_refused(arguments, words, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = [] if "--config" in arguments else ["--config", str(ROOT / "configs/cluster/production.yaml")]
    assert cli.main(["cluster", "render", *config, "--output", str(tmp_path), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_every_stage_with_a_cluster_of_its_own_can_be_rendered() -> None:
    assert set(RENDERED_STAGES) == set(STAGES) - {"quickstart"}
