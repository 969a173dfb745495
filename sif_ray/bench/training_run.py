"""GRPO runs of the real stage on toy scenes, and what their own records say of the steps in the middle."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sif_ray.bench.cpu import CpuWatch
from sif_ray.bench.findings import spread
from sif_ray.bench.toy_dataset import SPLIT
from sif_ray.config import EngineConfig, GrpoConfig, LearnerConfig, ObjectiveConfig, SamplingConfig
from sif_ray.loop import stage
from sif_ray.observe.metrics import read_metrics
from sif_ray.observe.timeline import Span, merge_intervals, read_timeline
from sif_ray.rollout.environment import environment

_AS_OTHERS = {"RAY_worker_niceness": "0"}  # what else runs on the machine meets both sides of a comparison alike
MAX_PARITY = 1e-3  # mean |delta log-prob|, engine against learner, in float32


@dataclass(frozen=True)
class TrainingLoad:
    """How much work of what form."""

    steps: int = 14
    groups_per_step: int = 16
    group_size: int = 8
    max_tokens: int = 96
    max_num_seqs: int = 128
    max_staleness: int = 2
    judge_latency_s: float = 0.3

    @property
    def completions_per_step(self) -> int:
        return self.groups_per_step * self.group_size


def make_config(folder: Path, policy: str, load: TrainingLoad) -> GrpoConfig:
    """A run of the load on the dataset `data` in `folder`."""
    return GrpoConfig(
        data=str(folder / "data"),
        split=SPLIT,
        policy=policy,
        output=str(folder / "run"),
        max_steps=load.steps,
        groups_per_step=load.groups_per_step,
        group_size=load.group_size,
        max_staleness=load.max_staleness,
        checkpoint_every=max(1, load.steps // 3),
        objective=ObjectiveConfig(kl_beta=0.0),
        sampling=SamplingConfig(max_tokens=load.max_tokens),
        engine=EngineConfig(max_model_len=512, max_num_seqs=load.max_num_seqs, kv_cache_gib=0.5),
        # Small: the policy stays what it is, lengths included (at 1e-6 Adam's steps, all of one sign through a layer,
        # make completions six times as long in 14 steps). The decay moves all weights a little, so that updates and
        # probes show it.
        learner=LearnerConfig(learning_rate=1e-9, weight_decay=1e4, lr_schedule="constant"),
        trackers=[],
    )


@dataclass(frozen=True)
class Middle:
    """The steps of a run that count, as a rule those in which the pipeline is neither filling nor emptying."""

    steps: int
    seconds: float
    completions_per_s: float
    tokens_per_s: float  # of completions
    busy_s: dict[str, float]  # by stage; what several groups do at once counts once
    cores: float  # at work, in the mean
    learner_idle_share: float
    engine_idle_share: float
    prompt_tokens: float  # mean
    computed_prompts_per_group: float  # by the engine, in prompts; a group without any sharing has G
    parity_mean_abs: float  # the largest of all probes of the run
    staleness_max: float

    @property
    def busiest_s(self) -> float:
        return max(self.busy_s.values())


def run(config: GrpoConfig, edge: int | None = None) -> tuple[Middle, dict[str, float]]:
    """Run the stage `grpo` to its end; what its middle was like and the CPU seconds of the whole run by process.

    `edge` steps at both ends do not count, by default `max_staleness` + 1. The output folder is removed. Raises
    `RuntimeError` when a prompt was dropped, not every step was done, or a check of the loop found something.
    """
    output = Path(config.output)
    with CpuWatch() as watch, environment(_AS_OTHERS):
        stage.run(config)
    finished = json.loads((output / "finished.json").read_text())
    if finished["version"] != config.max_steps or finished["dropped"]:
        raise RuntimeError(f"{finished['version']} of {config.max_steps} steps, dropped: {finished['dropped']}")
    middle = read_middle(output, config, config.max_staleness + 1 if edge is None else edge, watch.cores)
    if middle.parity_mean_abs > MAX_PARITY or middle.staleness_max > config.max_staleness:
        raise RuntimeError(f"engine and learner differ, or tokens are too old: {middle}")
    shutil.rmtree(output)
    return middle, watch.seconds


def read_middle(output: Path, config: GrpoConfig, edge: int, cores: Callable[[float, float], float]) -> Middle:
    """From the end of step `edge` to the end of the step as many before the last. With more than `max_staleness` the
    engines are ahead of the learner by as much at both, so that as many completions are trained in between as are
    generated: with long-tailed lengths no more than about as many tokens, as long completions come late. Without an
    edge it is all steps, from the first rollout on. `cores`: how many were at work between two unix times."""
    steps = read_metrics(output / "metrics.jsonl")
    within = steps[edge : len(steps) - edge]
    spans = read_timeline(output / "timeline.jsonl")
    begin_s = steps[edge - 1]["time_s"] if edge else min(span.start_s for span in spans if span.kind == "generate")
    end_s = within[-1]["time_s"]
    seconds = end_s - begin_s
    completions = len(within) * config.groups_per_step * config.group_size
    tokens = sum(step["trained_tokens"] for step in within)
    computed = [1 - step["prompt_cache_share"] for step in within if "prompt_cache_share" in step]
    return Middle(
        steps=len(within),
        seconds=seconds,
        completions_per_s=completions / seconds,
        tokens_per_s=tokens / seconds,
        busy_s=busy_seconds(spans, begin_s, end_s),
        cores=cores(begin_s, end_s),
        learner_idle_share=statistics.mean(step["learner_idle_share"] for step in within),
        engine_idle_share=statistics.mean(step["engine_idle_share"] for step in within),
        prompt_tokens=statistics.mean(span.labels["prompt_tokens"] for span in spans if span.kind == "generate"),
        computed_prompts_per_group=config.group_size * statistics.mean(computed),
        parity_mean_abs=max(step["parity_mean_abs"] for step in steps if "parity_mean_abs" in step),
        staleness_max=max(step["staleness_max"] for step in steps),
    )


def busy_seconds(spans: Sequence[Span], begin_s: float, end_s: float) -> dict[str, float]:
    """Seconds between two times in which something of a kind was under way: "generate", "score", "train", "sync"."""
    found = {}
    for kind in ("generate", "score", "train", "sync"):
        clipped = ((max(span.start_s, begin_s), min(span.end_s, end_s)) for span in spans if span.kind == kind)
        found[kind] = sum(end - start for start, end in merge_intervals(pair for pair in clipped if pair[0] < pair[1]))
    return found


def middle_figures(found: Sequence[Middle]) -> dict[str, Any]:
    """Every field over repetitions."""
    figures: dict[str, Any] = {}
    for name in vars(found[0]):
        values = [getattr(one, name) for one in found]
        if isinstance(values[0], dict):
            figures[name] = {key: spread([value[key] for value in values]) for key in values[0]}
        else:
            figures[name] = spread(values)
    return figures
