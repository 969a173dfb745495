"""The stage with real parts: vLLM engine, DeepSpeed learner, reward worker, each a Ray actor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sif_ray.bench.toy_dataset import write_dataset
from sif_ray.config import ConfigError, EngineConfig, GrpoConfig, JudgeConfig, LearnerConfig, SamplingConfig
from sif_ray.loop import stage
from sif_ray.observe.completions import read_completions
from sif_ray.observe.metrics import read_metrics
from sif_ray.observe.timeline import busy_share, read_timeline
from sif_ray.toyworld import assets


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("grpo") / "data", 4)


def config_of(dataset: Path, output: Path, **changes) -> GrpoConfig:
    settings = {
        "data": str(dataset),
        "split": "grpo",
        "policy": "toy",
        "output": str(output),
        "epochs": 2.0,
        "max_steps": 3,
        "groups_per_step": 2,
        "group_size": 4,
        "max_staleness": 1,
        "parity_every": 1,
        "sampling": SamplingConfig(max_tokens=24),
        "engine": EngineConfig(max_model_len=512, max_num_seqs=8, kv_cache_gib=0.25),
        # The toy base policy does not speak SIF and earns nothing, so the weights are moved by decay, and far.
        "learner": LearnerConfig(learning_rate=5e-3, weight_decay=20.0, lr_schedule="constant"),
    }
    return GrpoConfig(**(settings | changes))


@pytest.mark.timeout(600)  # half a minute on two idle cores
def test_three_steps_with_real_engine_and_learner(ray_local, dataset, tmp_path):
    stage.run(config_of(dataset, tmp_path, trackers=["prometheus", "tensorboard"]))

    steps = read_metrics(tmp_path / "metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert steps[2]["kl"] > 1e-4, "the weights have not moved, so the probe and the receipts show nothing"
    assert max(step["staleness_max"] for step in steps) <= 1
    assert max(step["parity_mean_abs"] for step in steps) < 1e-3
    num_bytes = sum(t.nbytes for t in load_file(tmp_path / "checkpoint" / "model.safetensors").values())
    assert {step["sync_bytes"] for step in steps} == {num_bytes}
    assert all(0 <= step[f"{part}_idle_share"] < 1 for part in ("learner", "engine") for step in steps)
    assert steps[2]["tickets/trained"] == 6
    kept = read_completions(tmp_path)
    assert [line["step"] for line in kept] == [1, 1, 2, 2, 3, 3]
    assert all((tmp_path / line["picture"]).is_file() for line in kept)
    assert list((tmp_path / "tensorboard").iterdir())

    finished = json.loads((tmp_path / "finished.json").read_text())
    assert finished["counts"]["trained"] == 6 and finished["version"] == 3

    before = load_file(assets.path("tiny_policy") / "model.safetensors")
    after = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert before.keys() == after.keys()
    name = "lm_head.weight"
    assert 0.7 < (after[name].norm() / before[name].norm()).item() < 0.76  # (1 - 5e-3 * 20) ** 3, and what KL adds

    spans = read_timeline(tmp_path / "timeline.jsonl")
    assert {(span.lane, span.kind) for span in spans} == {
        ("engine 0", "generate"),
        ("reward 0", "score"),
        ("learner 0", "train"),
        ("learner 0", "wait"),
        ("sync", "sync"),
    }
    assert busy_share(spans, "learner 0", ["train"]) > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sharded_weights_reach_two_engines_over_process_groups(ray_local, dataset, tmp_path):
    learner = LearnerConfig(
        num_ranks=2, zero_stage=3, learning_rate=5e-3, weight_decay=20.0, lr_schedule="constant", num_cpus_per_rank=0.5
    )
    engine = EngineConfig(max_model_len=512, max_num_seqs=8, kv_cache_gib=0.25, num_cpus=0.5)
    stage.run(config_of(dataset, tmp_path, weight_transfer="gloo", num_engines=2, learner=learner, engine=engine))

    steps = read_metrics(tmp_path / "metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert steps[2]["kl"] > 1e-4
    assert max(step["parity_mean_abs"] for step in steps) < 1e-3
    num_bytes = sum(t.nbytes for t in load_file(tmp_path / "checkpoint" / "model.safetensors").values())
    assert max(step["sync_bytes"] for step in steps) == 2 * num_bytes  # an engine that starts later joins later


# --- requests that cannot work ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "/nowhere"}, "/nowhere"),
        ({"split": "nonsense"}, "nonsense"),
        ({"policy": "runs/no/such/checkpoint"}, "policy = 'runs/no/such/checkpoint'"),
        ({"epochs": 0.01}, "epochs = 0.01"),
        (
            {"judge": JudgeConfig(kind="llm", model="m", base_url="http://127.0.0.1:9/v1", max_retries=0)},
            "judge: 'm' at http://127.0.0.1:9/v1 gave no score",
        ),
        ({"num_engines": 40}, r"42 logical CPUs \(1 learner \+ 40 engine \+ 1 reward\) exceed the 4"),
    ],
)
def test_impossible_request_is_refused_before_anything_starts(ray_local, dataset, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        stage.run(config_of(dataset, tmp_path, **changes))
