"""The stage with real parts: vLLM engine, DeepSpeed learner, reward worker, each a Ray actor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from sif_ray.config import ConfigError, EngineConfig, GrpoConfig, JudgeConfig, LearnerConfig, SamplingConfig
from sif_ray.datagen.dataset import ACCEPTED, FORMAT, MANIFEST, ROW_SCHEMA
from sif_ray.loop import stage
from sif_ray.method import depth_code
from sif_ray.observe.metrics import read_metrics
from sif_ray.observe.timeline import busy_share, read_timeline
from sif_ray.records import Sample, sample_to_row
from sif_ray.toyworld import assets
from sif_ray.toyworld.questions import draw_questions
from sif_ray.toyworld.render import png, render
from sif_ray.toyworld.scenes import make_scene


def toy_samples(count: int) -> Iterator[Sample]:
    for seed in range(count):
        scene = make_scene(seed)
        rendering = render(scene)
        question = draw_questions(scene, 1)[0]
        height, width = rendering.z_m.shape
        yield Sample(
            sample_id=f"toy-{seed}",
            scene_id=f"toy-{seed}",
            dataset="toyworld",
            split="grpo",
            question=question.text,
            question_type=question.question_type,
            answer=question.answer,
            boxes=question.boxes(rendering),
            width=width,
            height=height,
            image=png(rendering.rgb),
            depth_image=png(depth_code.encode(depth_code.from_disparity(rendering.disparity))),
            depth_source="exact",
            source_frame="image",
        )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("grpo") / "data"
    rows = [sample_to_row(sample) | {"reasons": []} for sample in toy_samples(4)]
    (folder / ACCEPTED).mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=ROW_SCHEMA), folder / ACCEPTED / "part-00000.parquet")
    manifest = {"format": FORMAT, "counts": {"splits": {"grpo": {"accepted": len(rows)}}}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


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
    stage.run(config_of(dataset, tmp_path))

    steps = read_metrics(tmp_path / "metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert steps[2]["kl"] > 1e-4, "the weights have not moved, so the probe and the receipts show nothing"
    assert max(step["staleness_max"] for step in steps) <= 1
    assert max(step["parity_mean_abs"] for step in steps) < 1e-3
    num_bytes = sum(t.nbytes for t in load_file(tmp_path / "checkpoint" / "model.safetensors").values())
    assert {step["sync_bytes"] for step in steps} == {num_bytes}

    ledger = json.loads((tmp_path / "ledger.json").read_text())
    assert ledger["counts"]["trained"] == 6 and ledger["version"] == 3
    assert json.loads((tmp_path / "state" / "progress.json").read_text())["means"].keys() == {
        f"toy-{seed}" for seed in range(4)
    }

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
