"""The simulator against real GRPO runs of the tiny policy: vLLM engine, DeepSpeed learner, reward worker."""

from __future__ import annotations

import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from sif_ray import config as configuration
from sif_ray.observe.metrics import read_metrics
from sif_ray.plan.command import scenario_of
from sif_ray.plan.figures import figures_of
from sif_ray.plan.measured import read_measurements
from sif_ray.plan.simulation import simulate

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40
GRPO = f"""
data: data
split: grpo
policy: warmup/checkpoint
max_steps: {STEPS}
groups_per_step: 4
max_staleness: 2
parity_every: 1000
checkpoint_every: 0
trackers: []
objective: {{kl_beta: 0.0}}
rewards: {{format: 0.5, depth: 0.5, gate_depth_by_iou: true}}
sampling: {{temperature: 1.0, max_tokens: 200}}
engine: {{max_model_len: 512, max_num_seqs: 128, kv_cache_gib: 0.5}}
learner: {{learning_rate: 1.0e-4}}
"""
WARMUP = [
    *("data=data", "split=warmup", "policy=toy", "output=warmup", "epochs=2", "batch_size=32"),
    *("learner.learning_rate=0.006", "learner.lr_schedule=cosine", "learner.warmup_share=0.1", "learner.threads=2"),
]


def job(folder: Path, name: str, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments], cwd=folder, check=True, timeout=1200
    )


def median_step_s(run: Path, first: int) -> float:
    ends = [line["time_s"] for line in read_metrics(run / "metrics.jsonl") if line["step"] >= first - 1]
    return statistics.median(after - before for before, after in pairwise(ends))


@pytest.mark.slow  # ten minutes on two idle cores
@pytest.mark.timeout(3600)
def test_step_time_of_the_toy_run_is_predicted(tmp_path):
    scenes = ["source=toyworld", "splits={warmup: 700, grpo: 400}", "questions_per_scene=2", "decimals=2"]
    job(tmp_path, "generate", *scenes, "depth_model=toy", "output=data")
    job(tmp_path, "warmup", *WARMUP)
    (tmp_path / "grpo.yaml").write_text(GRPO)
    job(tmp_path, "grpo", "--config", "grpo.yaml", "output=asynchronous")
    job(tmp_path, "grpo", "--config", "grpo.yaml", "output=synchronous", "max_staleness=0")

    for run in ("asynchronous", "synchronous"):
        measured = read_measurements(tmp_path / run, first=3, last=STEPS // 2)
        config = configuration.load("grpo", str(tmp_path / run / "config.yaml"))
        predicted_s = figures_of(simulate(scenario_of(config, measured, STEPS)), 0.0).step_s
        true_s = median_step_s(tmp_path / run, STEPS // 2 + 1)
        print(f"{run}: predicted {predicted_s:.2f} s, measured {true_s:.2f} s a step")
        assert predicted_s == pytest.approx(true_s, rel=0.2), run
