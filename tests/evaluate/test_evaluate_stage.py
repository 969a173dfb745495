"""The stage as a user runs it, with a real engine: a dataset folder and a checkpoint in, results and items out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import benchmark_files as build
import numpy as np
import pyarrow.parquet as pq
import pytest

from sif_ray.config import BenchmarkConfig, ConfigError, EngineConfig, EvaluateConfig, RewardConfig
from sif_ray.datagen.dataset import ACCEPTED, FORMAT, MANIFEST
from sif_ray.datagen.drafts import Draft, drafts_to_table
from sif_ray.depth.encoding import depth_png
from sif_ray.evaluate.heldout import table
from sif_ray.evaluate.metrics import TERMS
from sif_ray.evaluate.stage import run
from sif_ray.method import rewards
from sif_ray.method.depth_code import from_disparity
from sif_ray.observe.jsonl import read
from sif_ray.records import Sample
from sif_ray.toyworld.questions import CHANCE, draw_questions
from sif_ray.toyworld.render import png, render
from sif_ray.toyworld.scenes import make_scene

pytestmark = pytest.mark.timeout(900)  # a busy machine may be slow, not wrong

NUM_SCENES = 4
ARMS = {"greedy": 1, "greedy_blind": 1, "greedy_swapped_depth": 1, "sampled_T1.0": 2}


def toy_samples(num_scenes: int) -> list[Sample]:
    samples = []
    for seed in range(num_scenes):
        scene = make_scene(987_000 + seed)
        rendering = render(scene)
        depth_rel = from_disparity(rendering.disparity)
        samples += [
            Sample(
                sample_id=f"{seed}-{question.question_type}",
                scene_id=str(seed),
                dataset="toyworld",
                split="heldout",
                question=question.text,
                question_type=question.question_type,
                answer=question.answer,
                boxes=question.boxes(rendering),
                width=depth_rel.shape[1],
                height=depth_rel.shape[0],
                image=png(rendering.rgb),
                depth_image=depth_png(depth_rel),
                depth_source="exact",
                source_frame="image",
            )
            for question in draw_questions(scene, 2)
        ]
    return samples


def write_dataset(folder: Path, samples: list[Sample]) -> str:
    (folder / ACCEPTED).mkdir(parents=True)
    pq.write_table(drafts_to_table([Draft(sample) for sample in samples]), folder / ACCEPTED / "00000.parquet")
    manifest = {"format": FORMAT, "counts": {"splits": {"heldout": {"accepted": len(samples)}}}}
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return toy_samples(NUM_SCENES)


@pytest.fixture(scope="module")
def config(samples, tmp_path_factory) -> EvaluateConfig:
    folder = tmp_path_factory.mktemp("evaluate")
    return EvaluateConfig(
        data=write_dataset(folder / "data", samples),
        benchmarks={"toy": BenchmarkConfig(name="cvbench", annotations="toy", max_items=6)},
        checkpoints={"base": "toy"},
        output=str(folder / "out"),
        temperatures=[1.0],
        draws=2,
        max_tokens=24,
        bootstrap_samples=200,
        engine=EngineConfig(max_model_len=768, max_num_seqs=16, kv_cache_gib=0.25),
    )


@pytest.fixture(scope="module")
def output(config, ray_local) -> Path:
    run(config)
    return Path(config.output)


@pytest.fixture(scope="module")
def items(output) -> list[dict]:
    return read(output / "items.jsonl")


@pytest.fixture(scope="module")
def results(output) -> dict:
    return json.loads((output / "results.json").read_text())


def test_every_item_is_answered_once_per_arm_and_draw(items, samples):
    expected = {
        (arm, sample.sample_id, draw) for arm, draws in ARMS.items() for sample in samples for draw in range(draws)
    }
    assert len(items) == len(expected)
    assert {(item["arm"], item["sample_id"], item["draw"]) for item in items} == expected
    assert all(item["checkpoint"] == "base" and item["text"] for item in items)


def test_items_are_scored_against_their_own_scene(items, samples):
    own = {sample.sample_id: sample for sample in samples}
    for item in items:
        sample = own[item["sample_id"]]
        assert item["scene_id"] == sample.scene_id
        assert item["format"] == rewards.format_reward(item["text"])
        assert item["iou_last"] == pytest.approx(rewards.box_iou_reward(item["text"], sample.boxes))
        weights = RewardConfig()
        assert item["total"] == pytest.approx(
            sum(getattr(weights, term) * item[term] for term in ("format", "answer", "box", "depth"))
        )


def test_results_are_the_means_of_the_items(items, results, samples):
    assert (results["num_scenes"], results["num_items"]) == (NUM_SCENES, len(samples))
    arms = results["checkpoints"]["base"]["arms"]
    assert set(arms) == set(ARMS)
    for arm, found in arms.items():
        values = {term: [item[term] for item in items if item["arm"] == arm] for term in TERMS}
        assert found["n"] == len(values["total"]) == ARMS[arm] * len(samples)
        for term in TERMS:
            assert found["means"][term]["mean"] == pytest.approx(np.mean(values[term]))
    assert results["chance"] == {sample.question_type: CHANCE[sample.question_type] for sample in samples}
    assert results["seconds"] > 0
    assert results["paired"] == {}
    assert table(results).row_count == 1 + len(ARMS)


def test_transformers_writes_what_the_engine_writes(config, output, ray_local, tmp_path):
    run(replace(config, output=str(tmp_path), backend="transformers", temperatures=[]))
    for task in ("heldout", "toy"):
        greedy = f"answers/base/{task}/greedy.jsonl"
        theirs = {line["id"]: line["text"] for line in read(tmp_path / greedy)}
        ours = {line["id"]: line["text"] for line in read(output / greedy)}
        assert ours == theirs != {}
        assert len(set(ours.values())) > 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["benchmarks"]["toy"]["policies"]["base"]["greedy"][0]["n"] == 6


def test_a_task_without_any_answer_has_no_score(config, ray_local, tmp_path):
    small = replace(config, output=str(tmp_path), backend="transformers", temperatures=[])
    with pytest.raises(
        RuntimeError, match=r"base: 6 of 6 questions of toy .*prompt_refused 6: raise engine\.max_model_len"
    ):
        run(replace(small, engine=replace(config.engine, max_model_len=64)))
    assert not list(tmp_path.glob("answers/*/toy/*.jsonl")), "what was refused is tried again"


def test_toy_depth_is_not_taken_for_that_of_photographs(config, tmp_path):
    photos = BenchmarkConfig(name="sat", annotations=str(build.sat(tmp_path / "s.parquet", [(("a", "b"), "a", 1)])))
    with pytest.raises(ConfigError, match=r"depth_model = 'toy'.*benchmarks.real shows photographs"):
        run(replace(config, output=str(tmp_path / "out"), benchmarks={"real": photos}))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"checkpoints": {}}, "checkpoints is empty"),
        ({"split": "train"}, "train"),
        ({"data": "no/such/folder"}, "no/such/folder"),
        ({"checkpoints": {"base": "no/such/policy"}}, "checkpoints.base"),
    ],
)
def test_a_request_without_anything_to_evaluate_is_refused(change, word, samples, tmp_path):
    data = write_dataset(tmp_path / "data", samples)
    settings = {"data": data, "checkpoints": {"base": "toy"}, "output": str(tmp_path / "out"), **change}
    with pytest.raises(ConfigError, match=word):
        run(EvaluateConfig(**settings))


def test_a_dataset_that_cannot_be_evaluated_is_refused(samples, tmp_path):
    one = write_dataset(tmp_path / "one", [sample for sample in samples if sample.scene_id == "0"])
    with pytest.raises(ConfigError, match="a second"):
        run(EvaluateConfig(data=one, checkpoints={"base": "toy"}, output=str(tmp_path / "out")))
    unanswered = write_dataset(tmp_path / "blank", [replace(sample, answer=" ") for sample in samples])
    with pytest.raises(ConfigError, match="no answer"):
        run(EvaluateConfig(data=unanswered, checkpoints={"base": "toy"}, output=str(tmp_path / "out")))
    flat = write_dataset(tmp_path / "flat", [replace(sample, depth_image=b"") for sample in samples])
    with pytest.raises(ConfigError, match="no depth image"):
        run(EvaluateConfig(data=flat, checkpoints={"base": "toy"}, output=str(tmp_path / "out")))
