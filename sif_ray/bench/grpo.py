"""The suite `grpo`: completions per second of whole GRPO steps, beside TRL's `GRPOTrainer` on the same work.

Both train the toy policy (`answering_policy`: every completion has the same length and an answer to judge) in float32
on prompts of a photograph and its depth image, with the method's rewards, in turns. Ours is the stage `grpo` as it is:
a vLLM engine, a learner, a reward worker, weight updates with receipts, checkpoints and parity probes. TRL runs in an
environment of its own (`trl_steps` says how to make it), with all cores and transformers' `generate`: vLLM inside its
process does not load on a CPU. Without SIF_RAY_TRL_PYTHON, the interpreter of that environment, its goals are missed.
Both once more with a judge over HTTP that answers after 300 ms. Rates are those of the steps after the start; of ours,
also before the end, where the engine has nothing left to do.

In the same turns the stages are measured alone. Generation, rewards and update can at best overlap fully: the bound is
the rate of the busiest one, or that at which all of them together keep every core busy. No loop reaches it where the
stages slow each other down; how much they do, two processes tell that generate and update at once (`stages_at_once`).
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import sif_ray
from sif_ray.bench.answering_policy import write_answering_policy
from sif_ray.bench.chat_server import chat_server
from sif_ray.bench.findings import Findings, Goal, interleaved, share, spread
from sif_ray.bench.lone_stages import Lone, LoneStages, measure_lone_stages
from sif_ray.bench.stages_at_once import measure_at_once
from sif_ray.bench.toy_dataset import write_dataset
from sif_ray.bench.training_run import Middle, TrainingLoad, make_config, middle_figures, run
from sif_ray.bench.trl_steps import JUDGE_THREADS, TrlRequest
from sif_ray.config import GrpoConfig, JudgeConfig
from sif_ray.datagen.dataset import read_samples

log = logging.getLogger(__name__)

TRL_PYTHON = "SIF_RAY_TRL_PYTHON"
OVER_TRL, OVER_TRL_JUDGED = 3.0, 5.0
SHARE_OF_BOUND = 0.8
TRL_TIMEOUT_S = 900.0
AT_ONCE = ("generation", "update")


@dataclass(frozen=True)
class Load(TrainingLoad):
    """How much work."""

    trl_steps: int = 4
    lone_steps: int = 3
    at_once_s: float = 20.0
    trl_micro_batch: int = 32  # completions
    trl_threads: int = 2


@dataclass(frozen=True)
class _Stages:
    """Stages with nothing else on the machine, and the same with what they take at once."""

    alone: LoneStages
    at_once: LoneStages


@dataclass(frozen=True)
class _Ours:
    middle: Middle
    cpu_s: dict[str, float]
    judged: float  # completions whose answer went over HTTP


@dataclass(frozen=True)
class _Trl:
    completions_per_s: float
    prompt_tokens: float


def measure(repetitions: int, load: Load = Load()) -> Findings:
    """Both ways, without and with a judge's latency, and the stages alone."""
    python = os.environ.get(TRL_PYTHON, "")
    if not python:
        log.warning(
            "bench grpo: TRL is not measured; %s names no interpreter (see sif_ray/bench/trl_steps.py)", TRL_PYTHON
        )
    clean = dict(os.environ)  # before DeepSpeed and Ray write into it
    with tempfile.TemporaryDirectory(prefix="sif_ray-bench-") as name:
        folder = Path(name)
        write_dataset(folder / "data", (load.steps + 2) * load.groups_per_step)
        config = make_config(folder, write_answering_policy(folder / "policy"), load)
        ways: dict[str, Any] = {"stages": partial(_stages_turn, config, load)}
        for kind, judged in (("", False), ("_judged", True)):
            ways[f"ours{kind}"] = partial(_our_turn, config, load, judged)
            if python:
                ways[f"trl{kind}"] = partial(_trl_turn, config, load, judged, python, clean)
        found = interleaved(ways, repetitions)
    return _findings(load, found)


def trl_request(config: GrpoConfig, load: Load, output: str, judge_url: str) -> TrlRequest:
    """The work of `config` for TRL."""
    return TrlRequest(
        data=config.data,
        split=config.split,
        policy=config.policy,
        output=output,
        max_steps=load.trl_steps,
        groups_per_step=config.groups_per_step,
        group_size=config.group_size,
        max_tokens=config.sampling.max_tokens,
        temperature=config.sampling.temperature,
        learning_rate=config.learner.learning_rate,
        weight_decay=config.learner.weight_decay,
        micro_batch=load.trl_micro_batch,
        threads=load.trl_threads,
        profile=config.profile,
        seed=config.seed,
        judge_url=judge_url,
        prompt=asdict(config.prompt),
    )


def _stages_turn(config: GrpoConfig, load: Load) -> _Stages:
    samples = list(read_samples(config.data, config.split))
    # DeepSpeed does not start twice in a process.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        alone, batches = process.submit(measure_lone_stages, config, samples, load.lone_steps).result()
    generation, update = measure_at_once(config, samples, batches, load.at_once_s)
    found = _Stages(alone, replace(alone, generation=generation, update=update))
    for told, stages in (("alone", found.alone), ("at once", found.at_once)):
        bound = stages.bound_completions_per_s(os.cpu_count() or 1)
        log.info("bench grpo: stages %s allow %.1f completions/s: %s", told, bound, stages)
    return found


def _our_turn(config: GrpoConfig, load: Load, judged: bool) -> _Ours:
    with chat_server(load.judge_latency_s) as server:
        judge = JudgeConfig(kind="llm", model="bench", base_url=server.base_url) if judged else JudgeConfig()
        middle, cpu_s = run(replace(config, judge=judge))
    asked = float(len(server.replied_s))
    if judged and asked < 0.95 * load.steps * load.completions_per_step:  # equal answers of a group share a call
        raise RuntimeError(f"the judge was asked for {asked:.0f} of {load.steps * load.completions_per_step} answers")
    if abs(middle.tokens_per_s / middle.completions_per_s - load.max_tokens) > 1e-6:
        raise RuntimeError(f"completions are not all of {load.max_tokens} tokens: {middle}")
    log.info("bench grpo: ours%s, %.1f completions/s", " with a judge" if judged else "", middle.completions_per_s)
    return _Ours(middle, cpu_s, asked)


def _trl_turn(config: GrpoConfig, load: Load, judged: bool, python: str, clean: Mapping[str, str]) -> _Trl:
    with tempfile.TemporaryDirectory(prefix="trl-") as name, chat_server(load.judge_latency_s) as server:
        request = trl_request(config, load, f"{name}/out", server.base_url if judged else "")
        file = request.write(Path(name) / "request.json")
        done = subprocess.run(
            [python, "-m", "sif_ray.bench.trl_steps", str(file)],
            env={
                **clean,
                "PYTHONPATH": str(Path(sif_ray.__file__).parents[1]),
                "OMP_NUM_THREADS": str(load.trl_threads),
            },
            capture_output=True,
            text=True,
            timeout=TRL_TIMEOUT_S,
        )
    if done.returncode or not done.stdout:
        raise RuntimeError(f"TRL failed:\n{done.stderr[-4000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    asked = len(server.replied_s)
    if found["completion_tokens"] != load.max_tokens or (
        judged and asked != load.trl_steps * load.completions_per_step
    ):
        raise RuntimeError(f"TRL did other work: {found}, {asked} answers judged")
    ended_s = found["ended_s"]
    rate = (len(ended_s) - 1) * load.completions_per_step / (ended_s[-1] - ended_s[0])
    log.info("bench grpo: TRL%s, %.1f completions/s", " with a judge" if judged else "", rate)
    return _Trl(rate, found["prompt_tokens"])


def _findings(load: Load, found: dict[str, list[Any]]) -> Findings:
    num_cpus = os.cpu_count() or 1
    stages: dict[str, list[LoneStages]] = {
        "alone": [one.alone for one in found["stages"]],
        "at_once": [one.at_once for one in found["stages"]],
    }
    bounds = {name: [one.bound_completions_per_s(num_cpus) for one in ones] for name, ones in stages.items()}
    rates = {name: [one.middle.completions_per_s for one in found[name]] for name in ("ours", "ours_judged")}
    rates |= {name: [one.completions_per_s for one in found[name]] for name in found if name.startswith("trl")}
    goals = []
    for kind, told, wanted in (("", "", OVER_TRL), ("_judged", " with a judge of 300 ms", OVER_TRL_JUDGED)):
        measured = f"trl{kind}" in rates
        value = share(rates[f"ours{kind}"], rates[f"trl{kind}"]) if measured else 0.0
        suffix = "" if measured else f" (not measured: {TRL_PYTHON} is not set)"
        goals.append(Goal(f"completions/s{told}, of TRL's{suffix}", value, wanted, at_least=True))
    of_bound = share(rates["ours"], bounds["alone"])
    goals.append(Goal("completions/s, of what the stages alone allow", of_bound, SHARE_OF_BOUND, at_least=True))
    figures = {
        "load": asdict(load),
        "trl_judge_threads": JUDGE_THREADS,
        "completions_per_s": {name: spread(values) for name, values in rates.items()},
        "bound_completions_per_s": {name: spread(values) for name, values in bounds.items()},
        "of_bound": {name: share(rates["ours"], values) for name, values in bounds.items()},
        "stages_alone": {name: _stage(stages["alone"], name) for name in (*AT_ONCE, "rewards", "log_probs")},
        "stages_at_once": {name: _stage(stages["at_once"], name) for name in AT_ONCE},
        "prompts_computed_per_group": {
            "without_sharing": load.group_size,
            "engine": spread([one.middle.computed_prompts_per_group for one in found["ours"]]),
            "learner": spread([one.prompts_per_group for one in stages["alone"]]),
        },
        "trl_prompt_tokens": {
            name: spread([one.prompt_tokens for one in found[name]]) for name in found if name.startswith("trl")
        },
        "ours": middle_figures([one.middle for one in found["ours"]]),
        "ours_judged": middle_figures([one.middle for one in found["ours_judged"]]),
        "cpu_s_by_process": [one.cpu_s for one in found["ours"]],  # of whole runs, start included
    }
    return Findings(goals, figures)


def _stage(stages: list[LoneStages], name: str) -> dict[str, Any]:
    ones: list[Lone] = [getattr(one, name) for one in stages]
    return {
        "completions_per_s": spread([1 / one.wall_s for one in ones]),
        "cpu_s_per_completion": spread([one.cpu_s for one in ones]),
    }
