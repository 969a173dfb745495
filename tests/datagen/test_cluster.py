"""Data generation on a cluster whose nodes come and go: several real Ray nodes on this machine."""

from __future__ import annotations

import json
import multiprocessing
import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.dataset as pads
import pytest

from sif_ray.config import GenerateConfig, RayConfig
from sif_ray.datagen import stage
from sif_ray.datagen.content import content_of
from sif_ray.datagen.dataset import INDEX, read_manifest, read_samples
from sif_ray.datagen.index import write_plan
from sif_ray.datagen.pipeline import make_shards
from sif_ray.datagen.source import make_source
from sif_ray.runtime import ray_session
from sif_ray.storage import Folder

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

WAIT_S = 300.0  # for anything that must happen


def drive(config: GenerateConfig, summaries: Any) -> None:
    """The driver, a process of its own as Ray allows one connection per process: tells where every shard was made."""
    folder, source = Folder.open(config.output), make_source(config)
    plan = write_plan(folder, source.annotations(), config, content_of(config))
    with ray_session(config.ray):
        for summary in make_shards(source, list(range(plan.num_shards)), config, folder):
            summaries.put((summary["shard"], summary["node_id"]))
    stage.run(config)  # counts them, and writes the manifest
    summaries.put(None)


@pytest.fixture
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


def test_a_node_that_is_added_is_used_and_one_that_is_lost_loses_nothing(cluster, tmp_path):
    config = GenerateConfig(
        output=str(tmp_path / "data"),
        splits={"train": 1200},
        decimals=2,
        rows_per_shard=8,
        depth_actors_max=3,
        ray=RayConfig(address=cluster.address),
    )
    context = multiprocessing.get_context("spawn")
    summaries: Any = context.Queue()
    driver = context.Process(target=drive, args=(config, summaries))
    driver.start()
    shards: list[int] = []
    nodes: list[str] = []

    def take() -> bool:
        """The next shard that was made; False when there is none any more."""
        deadline_s = time.monotonic() + WAIT_S
        while time.monotonic() < deadline_s:
            try:
                found = summaries.get(timeout=1)
            except queue.Empty:
                assert driver.is_alive(), "the driver died"
                continue
            if found is not None:
                shards.append(found[0])
                nodes.append(found[1])
            return found is not None
        raise AssertionError(f"no shard within {WAIT_S} s")

    try:
        while len(shards) < 5:
            assert take()
        node = cluster.add_node(num_cpus=2)
        added_s = time.monotonic()
        while nodes.count(node.node_id) < 5:
            assert take(), f"the run ended with {nodes.count(node.node_id)} shards of the new node"
            if nodes[-1] == node.node_id and nodes.count(node.node_id) == 1:
                print(f"the node was used {time.monotonic() - added_s:.1f} s after it was added")
        cluster.remove_node(node, allow_graceful=False)
        made_before = len(shards)
        while take():
            pass
        driver.join(timeout=WAIT_S)
        assert driver.exitcode == 0
    finally:
        driver.kill()
        driver.join()
    assert len(shards) > made_before + 20, "the node was lost at the end of the run: nothing is shown"
    assert set(shards) == set(range(read_plan(config)["num_shards"]))
    assert len(set(nodes)) == 2
    index = pads.dataset(Path(config.output) / INDEX).to_table(columns=["sample_id"])["sample_id"].to_pylist()
    assert sorted(sample.sample_id for sample in read_samples(config.output)) == sorted(index)
    assert read_manifest(config.output)["counts"]["rejected"] == 0


def read_plan(config: GenerateConfig) -> dict[str, Any]:
    return json.loads((Path(config.output) / "plan.json").read_text())
