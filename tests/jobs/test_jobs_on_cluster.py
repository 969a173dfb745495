"""Every job through `submit` on a real cluster of three nodes with token authentication, nodes that come and go."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import pyarrow.dataset as pads
import pytest
from conftest import finished
from far_node import FAR, far_node

from sif_ray.observe.trail import read_trail
from sif_ray.ports import free_port
from sif_ray.toyworld.render import png, render
from sif_ray.toyworld.scenes import make_scene

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]

WAIT_S = 600.0  # for anything that must happen
SMALL_GRPO = ("groups_per_step=4", "group_size=4", "sampling.max_tokens=60", "num_engines=2", "checkpoint_every=2")


def until(holds: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    ends_s = time.monotonic() + WAIT_S
    while not holds():
        assert process is None or process.poll() is None, process.communicate()[0][-5000:]
        assert time.monotonic() < ends_s
        time.sleep(0.2)


def stop(cluster, job: str) -> None:
    command = ["ray", "job", "stop", "--address", cluster.address, job]
    subprocess.run(command, env=cluster.environment, check=True, capture_output=True)


def state(cluster, kind: str, **wanted: str) -> list[dict[str, str]]:
    """Entries of Ray's state API of which every key has the wanted value."""
    filters = {
        "filter_keys": list(wanted),
        "filter_predicates": ["="] * len(wanted),
        "filter_values": [*wanted.values()],
    }
    headers = {"Authorization": f"Bearer {cluster.token}"}
    url = f"{cluster.address}/api/v0/{kind}"
    reply = httpx.get(url, params={"detail": "1"} | filters, headers=headers, timeout=30).json()
    return reply["data"]["result"]["result"]


def works(cluster, node: str) -> bool:
    """Whether tasks or actors of jobs have run on a node."""
    return bool(state(cluster, "tasks", node_id=node))


def trained(output: Path) -> list[str]:
    """Tickets in the order in which they were trained."""
    trail = output / "trained.jsonl"
    return [ticket for step in read_trail(trail).values() for ticket in step] if trail.exists() else []


def test_a_dataset_is_made_while_nodes_come_and_go(cluster, submit, folder):
    output = folder / "restless"
    sizes = ("splits.train=400", "splits.heldout=10", "rows_per_shard=8", "depth_actors_max=4")
    node = cluster.add_node(2)
    job = submit("generate", "--config", "configs/generate.yaml", f"output={output}", *sizes)
    until(lambda: len(list(output.glob("data/*.parquet"))) >= 3, job)
    until(lambda: works(cluster, node), job)
    cluster.remove_node(node)
    until(lambda: len(list(output.glob("data/*.parquet"))) >= 6, job)
    other = cluster.add_node(2)
    until(lambda: works(cluster, other), job)
    finished(job)
    manifest = json.loads((output / "manifest.json").read_text())
    planned = pads.dataset(output / "index").count_rows()
    ids = pads.dataset(output / "data").to_table(columns=["sample_id"])["sample_id"].to_pylist()
    assert len(ids) == len(set(ids)) == manifest["counts"]["accepted"]
    assert manifest["counts"]["accepted"] + manifest["counts"]["rejected"] == planned > 2 * 400


def test_a_stopped_grpo_job_resumes_and_a_lost_node_costs_no_prompt(cluster, submit, folder, data, policy):
    output = folder / "grpo"
    paths = (f"data={data}", f"policy={policy}", f"output={output}")
    job = ("--run-id", "stopped", "grpo", "--config", "configs/grpo.yaml", *paths, "max_steps=25", *SMALL_GRPO)
    first = submit(*job)
    until(lambda: len(trained(output)) >= 12, first)
    finished(submit(*job), status=2)  # it is running
    stop(cluster, "stopped-1")
    assert "stopped" in finished(first, status=130)
    before = trained(output)
    assert len(before) < 25 * 4

    node = cluster.add_node(8)  # the biggest, which Ray gives actors to
    second = submit(*job)
    until(lambda: len(trained(output)) >= len(before) + 8, second)
    assert state(cluster, "actors", class_name="RolloutActor", state="ALIVE", node_id=node)
    cluster.remove_node(node)
    finished(second)
    after = trained(output)
    assert after[: len(before)] == before
    assert Counter(after) == Counter(set(after))  # no ticket twice
    assert len(after) == 25 * 4
    assert (output / "checkpoint" / "config.json").exists()


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="only root may make a network, with iproute2")
def test_a_node_whose_network_is_cut_costs_no_prompt(cluster, submit, folder, data, policy):
    output = folder / "cut"
    paths = (f"data={data}", f"policy={policy}", f"output={output}")
    limits = ("max_steps=40", "epochs=2", "lease_timeout_s=60", "stuck_after_s=120")
    with far_node(cluster, 8) as cable:  # the biggest, which Ray gives actors to
        until(lambda: bool(state(cluster, "nodes", node_ip=FAR, state="ALIVE")))
        (node,) = state(cluster, "nodes", node_ip=FAR)
        job = submit("grpo", "--config", "configs/grpo.yaml", *paths, *limits, *SMALL_GRPO)
        until(lambda: len(trained(output)) >= 8, job)
        assert state(cluster, "actors", class_name="RolloutActor", state="ALIVE", node_id=node["node_id"])
        cable.cut()
        until(lambda: bool(state(cluster, "nodes", node_ip=FAR, state="DEAD")), job)
        done = len(trained(output))
        until(lambda: len(trained(output)) >= done + 8, job)
        cable.mend()  # what the other side has written meanwhile comes too late
        finished(job)
    after = trained(output)
    assert Counter(after) == Counter(set(after))
    assert len(after) == 40 * 4


@pytest.mark.parametrize(
    "arguments",
    [
        ("data", "inspect", "{data}", "--output", "{folder}/data.html", "--open", "no"),
        ("data", "export", "{data}", "--output", "{folder}/published"),
        ("eval", "list"),
        ("export", "{policy}", "--output", "{folder}/exported"),
        ("plan", "--config", "configs/published/7b-split.yaml", "--gpu", "h100", "--steps", "9"),
        ("doctor", "grpo", "--config", "configs/grpo.yaml", "data={data}", "policy={policy}", "output={folder}/looked"),
        ("cluster", "check", "cluster/kuberay"),
        ("bench", "reward", "--repetitions", "1", "--json", "{folder}/bench.json"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_tools_run_as_jobs(submit, folder, data, policy, arguments):
    finished(submit(*(part.format(folder=folder, data=data, policy=policy) for part in arguments)))


def test_a_policy_is_evaluated_by_a_job(submit, folder, data, policy):
    output = folder / "evaluation"
    policies = [f"checkpoints.{name}={policy}" for name in ("warmup", "grpo")]
    keys = (f"data={data}", *policies, f"output={output}", "draws=1", "max_tokens=30")
    finished(submit("evaluate", "--config", "configs/evaluate.yaml", *keys))
    assert (output / "results.json").exists()


def test_a_policy_is_served_by_a_job_until_it_is_stopped(cluster, submit, policy):
    port = free_port()
    job = submit("--run-id", "served", "serve", "--config", "configs/serve.yaml", f"policy={policy}", f"port={port}")

    def ready() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    until(ready, job)
    files, question = {"image": png(render(make_scene(5)).rgb)}, {"question": "How many balls are there?"}
    reply = httpx.post(f"http://127.0.0.1:{port}/v1/sif", files=files, data=question, timeout=120)
    assert reply.status_code == 200, reply.text
    stop(cluster, "served-1")
    finished(job, status=130)
    until(lambda: not ready())


def test_the_quickstart_runs_as_a_job(submit, folder):
    output = folder / "quickstart"
    generate = ("generate.splits={warmup: 60, grpo: 20, heldout: 6}",)
    grpo = ("grpo.max_steps=2", "grpo.groups_per_step=4", "grpo.group_size=4", "grpo.sampling.max_tokens=40")
    evaluate = ("evaluate.draws=1", "evaluate.temperatures=[1.0]", "evaluate.max_tokens=40", "serve.max_tokens=40")
    sizes = (*generate, "warmup.epochs=0.3", *grpo, *evaluate)
    finished(submit("quickstart", "--config", "configs/quickstart.yaml", f"run_dir={output}", *sizes))
    assert (output / "serve" / "response.json").exists()
