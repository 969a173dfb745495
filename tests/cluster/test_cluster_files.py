"""What is committed for a cluster: manifests as rendered, overlays that build, a dashboard of series that exist, and an
image that fits."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_manifests import CRDS, NO_SCHEMAS, ROOT, crds, found_in, get, rendered, workers

from sif_ray.cluster.config import IMAGE_TAG, RAY_VERSION
from sif_ray.cluster.documents import Manifests, read
from sif_ray.cluster.pods import CODE_DIR, USER_ID

KUBERAY = ROOT / "cluster" / "kuberay"
IMAGE = ROOT / "cluster" / "image" / "Dockerfile"
OVERLAYS = sorted(path.parent.name for path in KUBERAY.glob("overlays/*/kustomization.yaml"))
BY_HAND = ("monitoring", "overlays")


@pytest.mark.parametrize(("name", "folder"), [("production", KUBERAY), ("dev", KUBERAY / "overlays" / "dev")])
def test_what_is_committed_is_what_is_rendered(name: str, folder: Path) -> None:
    files = rendered(name)
    committed = {
        str(path.relative_to(folder))
        for path in folder.rglob("*.yaml")
        if path.relative_to(folder).parts[0] not in BY_HAND
    }
    assert committed == set(files), "see cluster/kuberay/README.md for the command that renders it again"
    for path, content in files.items():
        assert (folder / path).read_text(encoding="utf-8") == content, f"{path}: render it again"


def test_the_folder_has_no_findings() -> None:
    manifests = read([str(KUBERAY)])
    assert len(manifests.documents) > 40
    assert found_in(manifests) == []


def built(overlay: str, folder: Path) -> Manifests:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    command = ["kubectl", "kustomize", str(KUBERAY / "overlays" / overlay)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (folder / "built.yaml").write_text(text, encoding="utf-8")
    return read([str(folder / "built.yaml")])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_builds_and_has_no_findings(overlay: str, tmp_path: Path) -> None:
    manifests = built(overlay, tmp_path)
    assert {"RayJob", "RayService", "RayCluster", "NetworkPolicy"} <= {item.kind for item in manifests.documents}
    assert not any(item.kind == "Secret" for item in manifests.documents)  # the template is not applied
    assert all("app.kubernetes.io/component" in item.metadata["labels"] for item in manifests.documents)
    assert found_in(manifests, crds() if CRDS.is_dir() else NO_SCHEMAS) == []


def capacity(group: dict[str, Any]) -> str:
    pod = group["template"]["spec"]
    tolerated = {item["key"] for item in pod.get("tolerations", [])}
    wanted = str(pod.get("nodeSelector", {}).get("sif.ray/capacity"))
    assert ("sif.ray/capacity" in tolerated) == (wanted == "spot")
    return wanted


def test_spot_takes_what_can_be_replaced_and_leaves_heads_and_learner(tmp_path: Path) -> None:
    manifests = built("spot", tmp_path)
    for stage in ("generate", "warmup", "grpo", "evaluate"):
        job = get(manifests, "RayJob", f"sif-{stage}")
        head = job["spec"]["rayClusterSpec"]["headGroupSpec"]
        assert capacity(head) == "on-demand"
        assert head["template"]["spec"]["priorityClassName"] == "sif-on-demand"
        for group in workers(job):
            expected = "on-demand" if stage == "grpo" and group["groupName"] == "learner" else "spot"
            assert capacity(group) == expected, (stage, group["groupName"])


@pytest.mark.parametrize(
    ("overlay", "label"), [("kueue", "kueue.x-k8s.io/queue-name"), ("volcano", "volcano.sh/queue-name")]
)
def test_queues_admit_the_gangs_alone(overlay: str, label: str, tmp_path: Path) -> None:
    queued = {item.name for item in built(overlay, tmp_path).documents if label in item.metadata["labels"]}
    assert queued == {"sif-warmup", "sif-grpo"}


def test_dev_needs_no_gpus_and_is_a_namespace_of_its_own(tmp_path: Path) -> None:
    text = yaml.safe_dump([item.body for item in built("dev", tmp_path).documents])
    assert "nvidia.com/gpu" not in text and "-gpu" not in text and "namespace: sif\n" not in text


# --- monitoring ------------------------------------------------------------------------------------------------------


def exported() -> set[str]:
    """Series by the names in the code that makes them, with the `ray_` that Ray puts before (test_prometheus.py)."""
    found: set[str] = set()
    for module in ("observe/prometheus.py", "serve/meter.py"):
        for node in ast.walk(ast.parse((ROOT / "sif_ray" / module).read_text(encoding="utf-8"))):
            ends = _ENDS.get(getattr(node.func, "id", ""), ()) if isinstance(node, ast.Call) else ()
            if ends and isinstance(node.args[0], ast.Constant):
                found |= {f"ray_{node.args[0].value}_{end}" for end in ends}
    from sif_ray.observe.prometheus import SUMMED

    found |= {f"ray_{name}_total" for name in SUMMED.values()}
    return found | {f"ray_sif_ray_{family}" for family in gauge_families()}


_ENDS = {"Counter": ("total",), "Histogram": ("bucket", "sum", "count")}


def gauge_families() -> set[str]:
    """First parts of the names under which a step logs values: the keys of dictionaries in the loop and its learner."""
    found = {"judge"}  # the name of the judge's caller, before "/calls"
    for module in ("loop/step_metrics", "loop/grpo", "loop/evaluation", "loop/parity", "learner/engine"):
        tree = ast.parse((ROOT / "sif_ray" / f"{module}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            keys = node.keys if isinstance(node, ast.Dict) else [node.key] if isinstance(node, ast.DictComp) else []
            for key in keys:
                start = key.values[0] if isinstance(key, ast.JoinedStr) else key
                if isinstance(start, ast.Constant) and isinstance(start.value, str):
                    found.add(start.value.partition("/")[0])
    return found


def series(expression: str) -> set[str]:
    return set(re.findall(r"\bray_sif\w*", expression))


def test_the_dashboard_queries_series_that_are_exported() -> None:
    dashboard = json.loads((KUBERAY / "monitoring" / "sif_ray.json").read_text(encoding="utf-8"))
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    queried = [series(target["expr"]) for panel in panels for target in panel["targets"]]
    assert len(panels) > 15 and all(queried)
    assert set().union(*queried) <= exported()
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) <= variables


def test_alarms_are_of_series_that_are_exported_and_lead_to_a_runbook() -> None:
    rules = yaml.safe_load((KUBERAY / "monitoring" / "alarms.yaml").read_text(encoding="utf-8"))
    alarms = [alarm for group in rules["spec"]["groups"] for alarm in group["rules"]]
    assert len({alarm["alert"] for alarm in alarms}) == len(alarms) >= 6
    for alarm in alarms:
        assert series(alarm["expr"]) and series(alarm["expr"]) <= exported(), alarm["alert"]
        assert re.fullmatch(r"docs/operations\.md#[a-z-]+", alarm["annotations"]["runbook"])


def test_an_unknown_series_would_be_noticed() -> None:
    assert not series("rate(ray_sif_ray_rewards_total[5m])") <= exported()
    assert {"ray_sif_ray_steps_total", "ray_sif_ray_staleness_bucket", "ray_sif_ray_reward"} <= exported()


# --- image -----------------------------------------------------------------------------------------------------------


def dockerfile() -> str:
    return re.sub(r"\\\n\s*", "", IMAGE.read_text(encoding="utf-8"))


def test_the_image_has_pinned_versions_and_the_tag_of_the_manifests() -> None:
    text = dockerfile()
    (python,) = re.findall(r"^ARG PYTHON_IMAGE=python:(\d+\.\d+)\.\d+-slim-\w+$", text, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert python in ("3.11", "3.12") and project["requires-python"] == ">=3.11,<3.13"
    assert set(re.findall(r"-t (sif-ray:\S+)", text)) == {f"sif-ray:{IMAGE_TAG}-{kind}" for kind in ("cpu", "gpu")}
    assert f"m.version('ray') == '{RAY_VERSION}'" in text
    assert f"ray=={RAY_VERSION}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert set(re.findall(r"\$\{VARIANT\},([\w,]+)\]", text)[0].split(",")) < set(project["optional-dependencies"])
    assert set(re.findall(r"VARIANT=(\w+)", text)) == {"cpu", "gpu"} < set(project["optional-dependencies"])


def test_the_image_copies_what_exists_in_the_order_in_which_it_changes() -> None:
    text = dockerfile()
    sources = [source for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for source in line.split()[:-1]]
    ignored = (IMAGE.parent / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    let_in = [line[1:] for line in ignored if line.startswith("!")]
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(source == entry or source.startswith(f"{entry}/") for entry in let_in), source
    assert ignored[0] == "*"
    places = [text.index(step) for step in ("apt-get", "COPY pyproject.toml", ".[${VARIANT}", "COPY sif_ray sif_ray")]
    assert places == sorted(places)


def test_the_image_has_the_user_the_folder_and_the_programs_that_pods_rely_on() -> None:
    text = dockerfile()
    assert f"\nUSER {USER_ID}:{USER_ID}\n" in text and text.rindex("USER ") > text.rindex("RUN ")
    assert f"\nWORKDIR {CODE_DIR}\n" in text
    assert "procps" in text and "wget" in text  # pkill before the head ends, KubeRay's probes
