"""With max_staleness = 0 the loop, with its real parts, is plain on-policy GRPO in one process."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from reference import PlainLearner, load_plain

from sif_ray.config import EngineConfig, GrpoConfig, LearnerConfig, ObjectiveConfig, SamplingConfig
from sif_ray.datagen.dataset import ACCEPTED, FORMAT, MANIFEST
from sif_ray.learner.actor import LearnerGroup
from sif_ray.loop import stage
from sif_ray.observe.metrics import read_metrics
from sif_ray.records import SAMPLE_SCHEMA, ScoredGroup, sample_to_row

NUM_STEPS = 5


@pytest.fixture
def dataset(tmp_path, make_sample) -> Path:
    folder = tmp_path / "dataset"
    rows = [sample_to_row(make_sample(scene)) for scene in range(10)]
    (folder / ACCEPTED).mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA), folder / ACCEPTED / "0.parquet")
    manifest = {"format": FORMAT, "counts": {"splits": {"warmup": {"accepted": len(rows)}}}}
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def config_of(dataset: Path, output: Path, policy: str, updates_per_batch: int) -> GrpoConfig:
    return GrpoConfig(
        data=str(dataset),
        split="warmup",
        policy=policy,
        output=str(output),
        max_steps=NUM_STEPS,
        groups_per_step=2,
        group_size=4,
        max_staleness=0,
        parity_every=1,
        objective=ObjectiveConfig(kl_beta=0.5, updates_per_batch=updates_per_batch),
        sampling=SamplingConfig(temperature=0.8, max_tokens=24),
        engine=EngineConfig(max_model_len=512, max_num_seqs=8, kv_cache_gib=0.25),
        learner=LearnerConfig(
            num_ranks=2, num_cpus_per_rank=0.5, zero_stage=3, learning_rate=2.5e-4, weight_decay=2.0, max_grad_norm=0.5
        ),
    )


def with_spread(scored: ScoredGroup) -> ScoredGroup:
    """Rewards made from the tokens: the policy is a fresh one, which earns nothing."""
    rewards = [float(np.mean(rollout.token_ids_T)) / 100 for rollout in scored.group.rollouts]
    return dataclasses.replace(scored, rewards_G=np.asarray(rewards, dtype=np.float32))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("updates_per_batch", [1, 2])
def test_five_steps_give_the_weights_of_a_single_process(
    ray_local, dataset, tmp_path, fresh_policy, monkeypatch, updates_per_batch
):
    batches: list[list[ScoredGroup]] = []

    class RecordingLearner(LearnerGroup):
        async def train(self, groups, version):
            assert version == len(batches)
            batches.append([with_spread(scored) for scored in groups])
            return await super().train(batches[-1], version)

    monkeypatch.setattr(stage, "LearnerGroup", RecordingLearner)
    config = config_of(dataset, tmp_path / "run", fresh_policy, updates_per_batch)
    stage.run(config)

    assert len(batches) == NUM_STEPS
    for version, groups in enumerate(batches):
        writers = {span[0] for scored in groups for rollout in scored.group.rollouts for span in rollout.version_spans}
        assert writers == {version}
    steps = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [step["staleness/0"] for step in steps] == [1.0] * NUM_STEPS
    assert max(step["parity_mean_abs"] for step in steps) < 1e-4  # the engine samples from the policy being trained

    plain = PlainLearner(config, num_updates=NUM_STEPS * updates_per_batch)
    for groups, step in zip(batches, steps, strict=True):
        updates = plain.train(groups)
        assert step["loss"] == pytest.approx(np.mean([update.loss for update in updates]), abs=1e-5)
        assert step["grad_norm"] == pytest.approx(np.mean([update.grad_norm for update in updates]), rel=1e-3)
    trained = dict(load_plain(str(tmp_path / "run" / "checkpoint")).named_parameters())
    start = dict(load_plain(fresh_policy).named_parameters())
    moved = []
    for name, expected in plain.policy.named_parameters():
        torch.testing.assert_close(trained[name], expected, atol=1e-4, rtol=0, msg=name)
        moved.append((trained[name] - start[name]).detach().abs().flatten())
    assert torch.cat(moved).mean() > 3e-4  # so the tolerance tells right from wrong
