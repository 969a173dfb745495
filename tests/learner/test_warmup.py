"""The warm-up stage through Ray Train on a handful of rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sif_ray.config import ConfigError, LearnerConfig, WarmupConfig
from sif_ray.datagen.dataset import FORMAT, MANIFEST
from sif_ray.learner import warmup
from sif_ray.observe.metrics import read_metrics
from sif_ray.policy.model import load_policy
from sif_ray.records import SAMPLE_SCHEMA, Sample, sample_to_row


@pytest.fixture
def dataset(tmp_path, make_sample) -> str:
    """Two shards of 8 scenes with 2 rows each, and rows of another split and refused rows that cannot be trained."""
    rows = [make_sample(scene, question=number) for scene in range(8) for number in range(2)]
    untrainable = [replace(make_sample(scene), trace="") for scene in range(8, 12)]
    heldout = [replace(row, split="heldout") for row in untrainable]
    folder = tmp_path / "dataset"
    write_shard(folder / "data" / "0.parquet", rows[:10])
    write_shard(folder / "data" / "1.parquet", rows[10:] + heldout)
    write_shard(folder / "rejected" / "0.parquet", untrainable)
    counts = {"splits": {"warmup": {"accepted": 16}, "heldout": {"accepted": 4}}}
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "counts": counts}), encoding="utf-8")
    return str(folder)


def write_shard(path: Path, rows: list[Sample]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([sample_to_row(row) for row in rows], schema=SAMPLE_SCHEMA), path)


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
    config = config_of(dataset, tmp_path, tiny_policy)
    for change, message in [
        ({"data": str(tmp_path / "empty")}, "no finished dataset"),
        ({"split": "training"}, r"'training': .* has 'heldout', 'warmup'"),
        ({"batch_size": 17}, r"batch_size = 17: .* 16 rows"),
        ({"learner": LearnerConfig(num_ranks=3)}, r"batch_size = 8.*num_ranks = 3"),
    ]:
        with pytest.raises(ConfigError, match=message):
            warmup.run(replace(config, **change))
    assert not (tmp_path / "out").exists()
