"""The parts of the doctor against independent truth: real files, figures worked out by hand, other programs' texts."""

from __future__ import annotations

import argparse
import io
import json
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sif_ray.cli import main, tool_parser
from sif_ray.config import ConfigError, GrpoConfig, load
from sif_ray.doctor import report, versions
from sif_ray.doctor.cgroup import Limits, read_limits
from sif_ray.doctor.checkup import Check, examine
from sif_ray.doctor.child import ChildError, run_module
from sif_ray.doctor.clocks import Trip, clock_findings
from sif_ray.doctor.cluster import job_findings
from sif_ray.doctor.cluster_resources import NodeResources, resource_findings
from sif_ray.doctor.finding import FAULT, NOTE, OK, fault, note, of_refusal, ok
from sif_ray.doctor.gpus import Gpu, parse
from sif_ray.doctor.links import Link, link_findings, pairs_of
from sif_ray.doctor.models import policy_findings
from sif_ray.doctor.nccl import variable_findings
from sif_ray.doctor.need import GpuNeed, Need, Policy, need_of
from sif_ray.doctor.torch_build import probe_torch
from sif_ray.doctor.versions import declared, difference_findings
from sif_ray.doctor.weights import weight_faults
from sif_ray.policy.shards import write_shards
from sif_ray.storage import Folder

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "cluster")
GIB = 2**30


def levels(findings) -> list[str]:
    return [finding.level for finding in findings]


# --- checks as such --------------------------------------------------------------------------------------------------


def test_a_check_that_breaks_or_hangs_is_a_fault_and_the_others_go_on():
    def break_after_one():
        yield ok("a", "fine")
        raise KeyError("no such thing")

    release = threading.Event()

    def hang():
        yield ok("b", "begun")
        release.wait(30)

    started_s = time.monotonic()
    found = examine([Check("a", break_after_one), Check("b", hang, 0.3), Check("c", lambda: [ok("c", "fine")])])
    assert time.monotonic() - started_s < 5
    release.set()
    assert [(finding.check, finding.level) for finding in found] == [
        ("a", OK),
        ("a", FAULT),
        ("b", OK),
        ("b", FAULT),
        ("c", OK),
    ]
    assert "the check itself broke: KeyError: 'no such thing'" in found[1].found and found[1].fix
    assert "no answer within 0.3 s" in found[3].found


def test_checks_are_made_at_the_same_time():
    barrier = threading.Barrier(3, timeout=10)
    found = examine([Check(str(number), lambda: (barrier.wait() and []) or []) for number in range(3)])
    assert found == []


def test_a_refusal_is_split_into_what_is_wrong_and_the_way_out():
    found = of_refusal("plan", ConfigError("a = 1: too small; wrong; raise it to 2"))
    assert (found.found, found.fix) == ("a = 1: too small; wrong", "raise it to 2")
    assert of_refusal("plan", ConfigError("a = 1: too small")).found == "a = 1: too small"


def test_a_process_that_hangs_is_ended_and_one_that_fails_is_told():
    started_s = time.monotonic()
    with pytest.raises(TimeoutError):
        run_module("http.server", timeout_s=0.5)
    assert time.monotonic() - started_s < 5
    with pytest.raises(ChildError, match="No module named no_such_module"):
        run_module("no_such_module", timeout_s=20)


# --- request ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["grpo", "no_such_key=1"], ["--config", "x.yaml"], ["group_size=2"]], ids=" ".join
)
def test_a_wrong_request_is_refused(arguments, capsys):
    assert main(["doctor", *arguments]) == 2
    assert capsys.readouterr().err


def test_the_stage_comes_first_and_overrides_anywhere():
    parsed = tool_parser("doctor").parse_intermixed_args(["grpo", "--config", "a.yaml", "x=1", "--json", "o", "y=2"])
    assert (parsed.stage, parsed.config, parsed.overrides) == ("grpo", "a.yaml", ["x=1", "y=2"])
    assert parsed == argparse.Namespace(
        stage="grpo", overrides=["x=1", "y=2"], config="a.yaml", json=Path("o"), address=None
    )


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_need_of_every_shipped_configuration_is_known(config):
    stage = next((name for name in ("quickstart", "warmup", "grpo", "evaluate", "serve") if config.stem == name), None)
    if stage is None and config.parent.name == "published":
        stage = "warmup" if config.stem.startswith("warmup") else "grpo"
    if stage is None:
        stage = "evaluate" if config.stem.startswith("eval_") else "generate"
    need = need_of(load(stage, str(config)))
    assert need.outputs or stage == "serve"
    assert (need.memory_bytes > 0 and need.local_cpus >= 4) or not need.is_local


def test_what_a_grpo_run_needs():
    """8 GPUs: 4 ranks and 4 engines; Qwen2.5-VL-7B has 8,292,166,656 parameters, two updates of it in two bytes."""
    need = need_of(load("grpo", str(ROOT / "configs/published/7b-split.yaml")))
    assert (need.gpus.count, need.gpus.per_node, need.gpus.nodes, need.gpus.memory_gib) == (8, 8, 1, 80)
    assert need.gpus.bfloat16 and need.engine and need.threads == 0
    assert 2 * 2 * 8_292_166_656 <= need.store_bytes <= 1.1 * 2 * 2 * 8_292_166_656
    assert [endpoint.field for endpoint in need.endpoints] == ["judge"]
    toy = need_of(GrpoConfig(policy="toy"))
    assert toy.policies == (Policy("policy", "toy", engine_on_cpu=True),)
    assert (toy.cpus, toy.threads, toy.gpus.count) == (3.0, 2, 0)
    assert 3 * GIB < toy.memory_bytes < 6 * GIB


def test_the_quickstart_does_not_need_what_it_makes():
    need = need_of(load("quickstart", str(ROOT / "configs/quickstart.yaml"), ["run_dir=runs/new"]))
    assert [policy.place for policy in need.policies] == ["toy"]
    assert need.datasets == () and [output.place for output in need.outputs] == ["runs/new"]


def test_a_run_of_its_own_inside_a_job_is_worth_a_note():
    assert levels(job_findings(Need(), {"RAY_ADDRESS": "10.0.0.1:6379"})) == [NOTE]
    assert levels(job_findings(Need(), {})) == []
    assert levels(job_findings(Need(address="auto"), {"RAY_ADDRESS": "10.0.0.1:6379"})) == []


# --- versions --------------------------------------------------------------------------------------------------------


def test_metadata_and_checkout_declare_the_same(tmp_path):
    """Of an installation without `pyproject.toml` the metadata is read, which setuptools has made of that file."""
    checkout, metadata = declared(), declared(tmp_path)
    assert {line.name.lower() for line in checkout.packages} == {line.name.lower() for line in metadata.packages}
    assert checkout.extras.keys() == metadata.extras.keys()
    assert sorted(checkout.python.split(",")) == sorted(metadata.python.split(","))


def test_another_python_is_a_fault():
    assert levels(versions.python_findings(declared(), "3.10.4")) == [FAULT]
    assert levels(versions.python_findings(declared(), "3.12.1")) == [OK]


def test_nodes_with_different_versions_are_told_apart():
    first = versions.compared_versions()
    assert first["ray"] == "2.60.0" and first["sif_ray"].count("(") == 1
    found = list(difference_findings({"a": first, "b": first, "c": first | {"torch": "2.12.0"}}))
    assert levels(found) == [FAULT]
    assert found[0].check == "versions on all nodes: torch" and "2.12.0 on c" in found[0].found
    assert levels(difference_findings({"a": first, "b": first})) == [OK]


def test_the_real_torch_is_seen_from_a_process_of_its_own():
    found = probe_torch()
    assert found["torch"] == torch.__version__ and found["cuda"] == torch.version.cuda
    assert found["available"] == torch.cuda.is_available() and found["error"] == found["torchvision_error"] == ""


# --- machine ---------------------------------------------------------------------------------------------------------


def test_limits_of_both_versions_of_control_groups(tmp_path):
    member = tmp_path / "membership"
    v1 = tmp_path / "v1"
    (v1 / "memory" / "docker" / "x").mkdir(parents=True)
    (v1 / "cpu,cpuacct").mkdir()
    (v1 / "memory" / "docker" / "x" / "memory.limit_in_bytes").write_text(str(2 * GIB))
    (v1 / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712")
    (v1 / "cpu,cpuacct" / "cpu.cfs_quota_us").write_text("150000")
    (v1 / "cpu,cpuacct" / "cpu.cfs_period_us").write_text("100000")
    member.write_text("4:memory:/docker/x\n3:cpu,cpuacct:/\n")
    assert read_limits(v1, member) == Limits(2 * GIB, 1.5)
    assert read_limits(tmp_path / "none", tmp_path / "none") == Limits(None, None)


def test_the_lines_of_nvidia_smi():
    text = (
        "0, NVIDIA A100-SXM4-80GB, 81920, 512, 550.54.15, 8.0, Disabled\n"
        "1, NVIDIA A100-SXM4-80GB, 81920, [N/A], 550.54.15, 8.0, Enabled\n"
        "2, NVIDIA GH200, [N/A], 0, 570.1, [N/A], [N/A]\n"
    )
    assert parse(text) == [
        Gpu(0, "NVIDIA A100-SXM4-80GB", 81920, 512, "550.54.15", 8.0, False),
        Gpu(1, "NVIDIA A100-SXM4-80GB", 81920, 0, "550.54.15", 8.0, True),
        Gpu(2, "NVIDIA GH200", 0, 0, "570.1", 0.0, False),
    ]


@pytest.mark.parametrize(
    ("environ", "level"),
    [
        ({}, OK),
        ({"NCCL_SOCKET_IFNAME": "eth"}, OK),  # a prefix
        ({"NCCL_SOCKET_IFNAME": "=eth"}, FAULT),  # a whole name
        ({"NCCL_SOCKET_IFNAME": "^docker,lo"}, OK),  # all but these
        ({"NCCL_SOCKET_IFNAME": "^eth,lo,docker"}, FAULT),
        ({"NCCL_SOCKET_IFNAME": "ib0,eth1"}, FAULT),
        ({"GLOO_SOCKET_IFNAME": "eth"}, FAULT),
        ({"GLOO_SOCKET_IFNAME": "eth0"}, OK),
        ({"NCCL_P2P_DISABLE": "1"}, NOTE),
        ({"NCCL_P2P_DISABLE": "0", "NCCL_DEBUG": "WARN"}, OK),
        ({"NCCL_DEBUG": "info"}, NOTE),
    ],
    ids=str,
)
def test_variables_of_nccl(environ, level):
    assert levels(variable_findings(environ, ["lo", "eth0", "docker0"])) == [level]


# --- models ----------------------------------------------------------------------------------------------------------


def test_weight_files_are_judged_by_their_headers(tmp_path):
    tensors = {f"layer.{number}": torch.rand(64, 64) for number in range(4)}
    write_shards(tmp_path, tensors.items(), {name: name for name in tensors}, shard_bytes=2 * 64 * 64 * 4)
    folder = Folder.open(tmp_path)
    assert list(weight_faults(folder)) == []
    first, second = sorted(tmp_path.glob("*.safetensors"))
    whole = first.stat().st_size
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    assert list(weight_faults(folder)) == [
        f"{first.name} is cut off: it has {whole - 1} of {whole} bytes",
        f"{second.name} is missing",
    ]
    first.write_bytes(first.read_bytes()[:20])
    assert "its header of" in next(weight_faults(folder))
    first.write_bytes(b"<html>not found</html>")
    assert "is no safetensors file" in next(weight_faults(folder))


def test_one_file_without_an_index(tmp_path):
    assert list(weight_faults(Folder.open(tmp_path))) == ["model.safetensors is missing"]
    save_file({"x": torch.zeros(3)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert list(weight_faults(Folder.open(tmp_path))) == []


def test_a_restricted_licence_is_worth_a_note(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = list(policy_findings(Policy("policy", "Qwen/Qwen2.5-VL-3B-Instruct")))
    assert [(finding.check, finding.level) for finding in found] == [
        ("model: policy", FAULT),
        ("licence: policy", NOTE),
    ]
    assert "no commercial use" in found[1].found


# --- clusters --------------------------------------------------------------------------------------------------------


def test_the_shortest_trip_says_how_far_a_clock_is_off():
    slow, quick = Trip(10.0, 13.0, 14.0), Trip(20.0, 20.06, 20.1)
    assert quick.ahead_s == pytest.approx(0.01) and slow.ahead_s == pytest.approx(1.0)
    assert levels(clock_findings({"a": [slow, quick]})) == [OK]
    behind = Trip(100.0, 99.0, 100.1)  # -1.05 s, of which 0.05 s may be the way
    found = list(clock_findings({"a": [quick], "b": [behind]}))
    assert levels(found) == [NOTE] and "b is 1.05 s behind" in found[0].found
    assert levels(clock_findings({"b": [Trip(100.0, 110.0, 100.1)]})) == [FAULT]
    unclear = Trip(100.0, 103.0, 106.5)  # off by 0.25 s or by nothing
    assert levels(clock_findings({"b": [unclear]})) == [OK]


def test_many_nodes_are_measured_in_a_ring():
    assert pairs_of("abc") == [("a", "b"), ("a", "c"), ("b", "c")]
    assert pairs_of(list("abcde")) == [("a", "b"), ("b", "c"), ("c", "d"), ("d", "e"), ("e", "a")]
    assert pairs_of("a") == []


def test_links_between_nodes():
    good = Link("a", "b", round_trip_s=0.001, mb_per_s=900.0)
    assert levels(link_findings([good])) == [OK]
    slow = Link("a", "c", round_trip_s=0.001, mb_per_s=40.0)
    found = list(link_findings([good, slow]))
    assert levels(found) == [NOTE] and "40 MB/s (a to c)" in found[0].found
    closed = Link("a", "d", closed_ports={"object manager": "no connection to port 7 of d"})
    lost = Link("b", "d", error="GetTimeoutError: ...")
    found = list(link_findings([good, closed, lost]))
    assert levels(found) == [FAULT, FAULT, OK]
    assert "object manager" in found[0].found and "port" in found[0].fix
    assert levels(link_findings([])) == []


def test_a_cluster_too_small_for_a_run():
    head, worker = NodeResources(0, 0, 2 * GIB), NodeResources(16, 8, 20 * GIB)
    need = Need(address="auto", cpus=12, gpus=GpuNeed(8, per_node=8, nodes=1), store_bytes=10 * GIB)
    everything = {"CPU": 16.0, "GPU": 8.0}
    assert levels(resource_findings([head, worker], everything, need)) == [OK, OK]
    busy = list(resource_findings([head, worker], {"CPU": 16.0, "GPU": 3.0}, need))
    assert levels(busy) == [OK, NOTE, OK] and "3 of 8 logical GPUs are free" in busy[1].found
    halves = [NodeResources(16, 4, 20 * GIB)] * 2
    assert [finding.check for finding in resource_findings(halves, everything, need) if finding.level == FAULT] == [
        "GPUs: machines"
    ]
    small = [NodeResources(8, 4, 5 * GIB)]
    assert [finding.check for finding in resource_findings(small, everything, need) if finding.level == FAULT] == [
        "GPUs: count",
        "GPUs: machines",
        "logical CPUs",
        "object store",
    ]


# --- report ----------------------------------------------------------------------------------------------------------


def test_lines_and_table_say_the_same():
    findings = [
        fault("judge: endpoint", "[bold]down[/bold]", "start it"),
        ok("memory", "64 GiB"),
        *[note("clocks", "odd", "NTP") for _ in range(3)],
    ]
    lines = io.StringIO()
    report.show(findings, 2.0, lines)
    assert lines.getvalue().splitlines() == [
        "ok     memory: 64 GiB",
        "note   clocks: odd",
        "       fix: NTP",
        "fault  judge: endpoint: [bold]down[/bold]",
        "       fix: start it",
        "1 fault, 3 notes, 1 ok in 2 s",
    ]
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    report.show(findings, 2.0, terminal)
    for word in ("memory", "64 GiB", "[bold]down[/bold]", "fix: start it", "fix: NTP"):
        assert word in terminal.getvalue()


def test_the_file_is_strict_json(tmp_path):
    file = tmp_path / "new" / "findings.json"
    report.write(file, report.as_json([fault("a", "b", "c")], "grpo", 1.23))
    found = json.loads(file.read_text())
    assert (found["ok"], found["stage"], found["counts"]) == (False, "grpo", {"ok": 0, "note": 0, "fault": 1})
    assert found["findings"] == [{"check": "a", "level": "fault", "found": "b", "fix": "c", "node": ""}]
