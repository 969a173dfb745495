"""A warm-up on a cluster that loses a node, with several real Ray nodes on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sif_dataset import write_dataset

from sif_ray.config import LearnerConfig, RayConfig, WarmupConfig, to_yaml
from sif_ray.observe.trail import read_trail

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

JOB = Path(__file__).parents[2] / "jobs" / "warmup.py"
WAIT_S = 400.0  # for anything that must happen


@pytest.fixture
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 5, "include_dashboard": False}  # one rank of 3, a reader and an encoder
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


def test_a_run_that_loses_a_node_goes_on_with_the_rank_that_is_left(cluster, tmp_path, make_sample):
    samples = [make_sample(scene, question=number) for scene in range(32) for number in range(2)]
    output = tmp_path / "out"
    config = WarmupConfig(
        data=write_dataset(tmp_path / "data", samples, rows_per_shard=16),
        split="warmup",
        output=str(output),
        epochs=1,
        batch_size=2,
        checkpoint_every=2,
        min_ranks=1,
        learner=LearnerConfig(num_ranks=2, num_cpus_per_rank=3.0, learning_rate=1e-3),
        ray=RayConfig(address=cluster.address),
    )
    file = tmp_path / "warmup.yaml"
    file.write_text(to_yaml(config))
    node = cluster.add_node(num_cpus=3)
    cluster.wait_for_nodes()
    driver = subprocess.Popen([sys.executable, str(JOB), "--config", str(file)])
    trail = output / "trained.jsonl"
    until_s = time.monotonic() + WAIT_S
    while not trail.exists() or len(read_trail(trail)) < 5:
        assert driver.poll() is None and time.monotonic() < until_s
        time.sleep(0.1)
    cluster.remove_node(node)
    assert driver.wait(WAIT_S) == 0
    lines = [json.loads(line) for line in trail.read_text().splitlines()]
    starts = [line["continue_from"] for line in lines if "continue_from" in line]
    assert len(starts) >= 2 and starts[1] >= 4
    newest = output / "checkpoints" / "step-000032" / "learner" / "step32"
    assert [path.name for path in newest.glob("rank*.pt")] == ["rank0.pt"]
    trained = [name for names in read_trail(trail).values() for name in names]
    assert sorted(trained) == sorted(sample.sample_id for sample in samples)
