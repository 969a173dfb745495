"""The warm-up stage through Ray Train and Ray Data on a handful of rows."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peft
import psutil
import pytest
import torch
from processes import processes_named
from sif_dataset import write_dataset
from transformers import Qwen2_5_VLForConditionalGeneration

from sif_ray.checkpoints import CheckpointError
from sif_ray.config import ConfigError, LearnerConfig, LoraConfig, RayConfig, WarmupConfig, to_yaml
from sif_ray.learner import warmup
from sif_ray.observe.metrics import read_metrics
from sif_ray.observe.trail import read_trail
from sif_ray.policy.model import load_policy

SCENES, BATCH = 16, 4
ROWS = 2 * SCENES
JOB = Path(__file__).parents[2] / "jobs" / "warmup.py"
WAIT_S = 240.0  # for a run on a busy machine to come so far


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, make_sample) -> str:
    """16 scenes with 2 rows each, in 5 shards, beside rows of another split that cannot be trained."""
    rows = [make_sample(scene, question=number) for scene in range(SCENES) for number in range(2)]
    heldout = [replace(make_sample(scene), trace="", split="heldout") for scene in range(30, 34)]
    return write_dataset(tmp_path_factory.mktemp("warmup") / "data", rows + heldout, rows_per_shard=8)


def config_of(dataset: str, output: Path, policy: str, num_ranks: int = 1, **changes) -> WarmupConfig:
    learner = LearnerConfig(num_ranks=num_ranks, learning_rate=2e-3, num_cpus_per_rank=0.5)
    config = WarmupConfig(
        data=dataset, split="warmup", policy=policy, output=str(output), epochs=2, batch_size=BATCH, learner=learner
    )
    return replace(config, **changes)


def check_every_row_once_an_epoch(output: Path, num_steps: int) -> None:
    steps = read_trail(output / "trained.jsonl")
    assert list(steps) == list(range(1, num_steps + 1))
    assert {len(sample_ids) for sample_ids in steps.values()} == {BATCH}
    trained = list(itertools.chain.from_iterable(steps.values()))
    for first in range(0, len(trained), ROWS):
        epoch = trained[first : first + ROWS]
        assert len(set(epoch)) == len(epoch)
    assert [line["step"] for line in read_metrics(output / "metrics.jsonl")] == list(steps)


def wait_for(condition: Callable[[], bool]) -> None:
    until_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.1)


def steps_done(output: Path) -> int:
    path = output / "trained.jsonl"
    return max(read_trail(path), default=0) if path.exists() else 0


# --- a run -----------------------------------------------------------------------------------------------------------


def test_warmup_learns_and_keeps_the_policy_that_the_evaluation_likes_best(ray_local, dataset, tmp_path, tiny_policy):
    lora = LoraConfig(rank=4)
    config = config_of(dataset, tmp_path / "out", tiny_policy, eval_share=0.3, eval_every=3, checkpoint_every=3)
    # a rate that is far too high after the first steps: the best policy is not the last one
    config.learner = replace(config.learner, lora=lora, learning_rate=0.5, warmup_share=0.5, lr_schedule="constant")
    warmup.run(config)
    output = tmp_path / "out"
    lines = read_metrics(output / "metrics.jsonl")
    evaluated = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert list(evaluated) == [step for step in range(1, len(lines) + 1) if step % 3 == 0 or step == len(lines)]
    finished = json.loads((output / "finished.json").read_text())
    best = min(evaluated, key=evaluated.get)
    assert finished["best"] == {"step": best, "eval_loss": evaluated[best]}
    assert best < len(lines)
    assert sorted(path.name for path in (output / "checkpoints").iterdir())[-1] == f"step-{len(lines):06d}"
    assert len(list((output / "checkpoints").iterdir())) == config.checkpoints_kept
    assert not (output / "ray_train").exists()

    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_policy, dtype=torch.float32)
    by_peft = peft.PeftModel.from_pretrained(base, output / "adapter").merge_and_unload()
    kept = dict(load_policy(str(output / "checkpoint")).named_parameters())
    for name, value in by_peft.named_parameters():
        torch.testing.assert_close(kept[name], value, atol=1e-6, rtol=0, msg=name)
    assert not torch.equal(kept["lm_head.weight"], load_policy(tiny_policy).lm_head.weight)

    written_s = (output / "finished.json").stat().st_mtime
    warmup.run(replace(config, eval_every=5))  # nothing to do
    assert (output / "finished.json").stat().st_mtime == written_s
    with pytest.raises(CheckpointError, match=r"seed = 1, was 0.*resume=false"):
        warmup.run(replace(config, seed=1))


@pytest.mark.slow
def test_a_rank_that_is_killed_in_mid_epoch_costs_no_row_and_repeats_none(ray_local, dataset, tmp_path, tiny_policy):
    config = config_of(dataset, tmp_path / "out", tiny_policy, num_ranks=2, checkpoint_every=2)
    output = tmp_path / "out"
    killed: list[int] = []

    def kill() -> None:
        wait_for(lambda: steps_done(output) >= 5)
        worker = processes_named("ray::RayTrainWorker")[-1]
        killed.append(steps_done(output))
        os.kill(worker.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    warmup.run(config)
    killer.join()
    assert 5 <= killed[0] < ROWS // BATCH * 2
    starts = [json.loads(line) for line in (output / "trained.jsonl").read_text().splitlines()]
    starts = [line["continue_from"] for line in starts if "continue_from" in line]
    assert starts[0] == 0 and 2 <= starts[1] <= killed[0] and len(starts) == 2
    check_every_row_once_an_epoch(output, num_steps=2 * ROWS // BATCH)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_and_two_ranks_with_zero_2_and_3_have_the_same_loss_curve(ray_local, dataset, tmp_path, tiny_policy):
    curves = {}
    for num_ranks, zero_stage in itertools.product((1, 2), (2, 3)):
        output = tmp_path / f"{num_ranks}-{zero_stage}"
        config = config_of(dataset, output, tiny_policy, num_ranks)
        # at ten times the rate Adam lets rounding noise grow to a hundredth in 16 steps
        config.learner = replace(config.learner, zero_stage=zero_stage, learning_rate=2e-4)
        warmup.run(config)
        curves[num_ranks, zero_stage] = [line["loss"] for line in read_metrics(output / "metrics.jsonl")]
        check_every_row_once_an_epoch(output, num_steps=2 * ROWS // BATCH)
    expected = curves[1, 2]
    assert expected[-1] < 0.7 * expected[0]
    for ranks_and_stage, curve in curves.items():
        print(ranks_and_stage, max(abs(one - other) for one, other in zip(curve, expected, strict=True)))
        assert curve == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_saves_its_step_and_goes_on_with_another_number_of_ranks(
    dataset, tmp_path, tiny_policy, signum
):
    output = tmp_path / "out"
    config = config_of(dataset, output, tiny_policy, num_ranks=2, ray=RayConfig(object_store_mib=200))
    file = tmp_path / "warmup.yaml"
    file.write_text(to_yaml(config))
    command = [sys.executable, str(JOB), "--config", str(file)]
    first = subprocess.Popen(command, cwd=tmp_path)
    wait_for(lambda: steps_done(output) >= 3 or first.poll() is not None)
    first.send_signal(signum)
    assert first.wait(WAIT_S) == 130
    stopped_at = steps_done(output)
    assert 3 <= stopped_at < 2 * ROWS // BATCH
    assert [path.name for path in (output / "checkpoints").iterdir()] == [f"step-{stopped_at:06d}"]
    assert not (output / "finished.json").exists() and not (output / ".stop").exists()
    assert subprocess.run([*command, "learner.num_ranks=1"], cwd=tmp_path, timeout=WAIT_S).returncode == 0
    check_every_row_once_an_epoch(output, num_steps=2 * ROWS // BATCH)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_ends_with_the_weights_of_one_that_was_left_alone(ray_local, dataset, tmp_path, tiny_policy):
    """Bit by bit: the order of the rows is drawn in advance, and a rank by itself computes the same twice."""
    left_alone = config_of(dataset, tmp_path / "left-alone", tiny_policy, checkpoint_every=3)
    warmup.run(left_alone)
    killed = replace(left_alone, output=str(tmp_path / "killed"), ray=RayConfig(object_store_mib=200))
    file = tmp_path / "warmup.yaml"
    file.write_text(to_yaml(killed))
    command = [sys.executable, str(JOB), "--config", str(file)]
    first = subprocess.Popen(command, cwd=tmp_path)
    wait_for(lambda: steps_done(tmp_path / "killed") >= 5 or first.poll() is not None)
    first.kill()
    first.wait()
    assert 5 <= steps_done(tmp_path / "killed") < 2 * ROWS // BATCH
    assert subprocess.run(command, cwd=tmp_path, timeout=WAIT_S).returncode == 0
    check_every_row_once_an_epoch(tmp_path / "killed", num_steps=2 * ROWS // BATCH)
    weights = [tmp_path / name / "checkpoint" / "model.safetensors" for name in ("left-alone", "killed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


# --- requests that cannot work ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "nowhere"}, "no finished dataset"),
        ({"split": "training"}, r"'training': .* has 'heldout', 'warmup'"),
        ({"split": "heldout"}, r"scene30-0 has no trace to learn from"),
        ({"batch_size": 33}, r"batch_size = 33: .* 32 rows"),
        ({"learner": LearnerConfig(num_ranks=5)}, r"batch_size = 4 .* learner.num_ranks \(5\)"),
        ({"min_ranks": 3}, r"min_ranks \(3\) is above learner.num_ranks \(1\)"),
        ({"learner": LearnerConfig(num_ranks=4)}, r"ray.num_cpus: 4 logical CPUs .* raise it to 5.5"),
        ({"eval_share": 1e-9}, r"eval_share = 1e-09: .* no photograph is held back"),
        ({"policy": "nowhere/policy"}, r"policy = 'nowhere/policy' is neither a folder"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(ray_local, dataset, tmp_path, tiny_policy, change, message):
    config = config_of(dataset, tmp_path / "out", tiny_policy)
    with pytest.raises(ConfigError, match=message):
        warmup.run(replace(config, **change))
    assert not (tmp_path / "out").exists()


def test_a_quantised_policy_and_a_full_disk_are_refused(dataset, tmp_path, fresh_policy, monkeypatch):
    config = config_of(dataset, tmp_path / "out", fresh_policy)
    usage = psutil.disk_usage("/")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10_000_000))
        with pytest.raises(ConfigError, match=r"output = .* GB are to be written"):
            warmup.run(config)
    file = Path(fresh_policy) / "config.json"
    plain = file.read_text()
    file.write_text(json.dumps(json.loads(plain) | {"quantization_config": {"bits": 4}}))
    try:
        with pytest.raises(ConfigError, match=r"is quantised .*QLoRA is out of scope"):
            warmup.run(config)
    finally:
        file.write_text(plain)
