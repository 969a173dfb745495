"""The warm-up stage through Ray Train on a handful of rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sif_ray.config import ConfigError, LearnerConfig, WarmupConfig
from sif_ray.learner import warmup
from sif_ray.observe.metrics import read_metrics
from sif_ray.policy.model import load_policy
from sif_ray.records import SAMPLE_SCHEMA, sample_to_row


@pytest.fixture
def dataset(tmp_path, make_sample) -> str:
    """Two shards of 8 scenes with 2 rows each, and rows of another split that cannot be trained."""
    rows = [make_sample(scene, question=number) for scene in range(8) for number in range(2)]
    rows += [replace(make_sample(scene), split="heldout", trace="") for scene in range(8, 12)]
    for number, shard in enumerate((rows[:10], rows[10:])):
        table = pa.Table.from_pylist([sample_to_row(row) for row in shard], schema=SAMPLE_SCHEMA)
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "data" / f"{number}.parquet")
    return str(tmp_path / "data")


def config_of(dataset: str, tmp_path: Path, policy: str, num_ranks: int = 1) -> WarmupConfig:
    learner = LearnerConfig(num_ranks=num_ranks, learning_rate=2e-3, num_cpus_per_rank=0.5)
    return WarmupConfig(
        data=dataset,
        split="warmup",
        policy=policy,
        output=str(tmp_path / "out"),
        epochs=2.5,
        batch_size=8,
        learner=learner,
    )


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_warmup_learns_the_traces(ray_local, dataset, tmp_path, tiny_policy, num_ranks):
    config = config_of(dataset, tmp_path, tiny_policy, num_ranks)
    warmup.run(config)
    lines = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]  # 16 rows are 2 batches; 2.5 epochs
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["tokens_per_s"] > 0 for line in lines)
    trained, start = load_policy(str(tmp_path / "out" / "checkpoint")), load_policy(tiny_policy)
    assert not torch.equal(trained.lm_head.weight, start.lm_head.weight)
    assert not (tmp_path / "out" / "ray_train").exists()


def test_impossible_requests_are_refused_before_anything_starts(dataset, tmp_path, tiny_policy):
    with pytest.raises(ConfigError, match="no Parquet files"):
        warmup.run(config_of(str(tmp_path / "empty"), tmp_path, tiny_policy))
    with pytest.raises(ConfigError, match=r"batch_size = 8.*num_ranks = 3"):
        warmup.run(config_of(dataset, tmp_path, tiny_policy, num_ranks=3))


def test_a_split_without_rows_is_refused(ray_local, dataset, tmp_path, tiny_policy):
    config = replace(config_of(dataset, tmp_path, tiny_policy), split="training")
    with pytest.raises(ConfigError, match=r"'training': 0 rows"):
        warmup.run(config)
