"""`sif-ray plan` from the command line, and what its estimates follow from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sif_ray import config as configuration
from sif_ray.cli import main
from sif_ray.plan.figures import figures_of
from sif_ray.plan.gpus import find_gpu
from sif_ray.plan.rates import Assumptions, decode_steps, learner_rates, max_sequences, workload_of
from sif_ray.plan.search import Division, Request, estimated_step_s, learner_gib, learner_sizes, search
from sif_ray.plan.simulation import simulate
from sif_ray.resources.shapes import KNOWN

ROOT = Path(__file__).resolve().parents[2]
SPLIT = str(ROOT / "configs/published/7b-split.yaml")
SHAPE, H100 = KNOWN["qwen2.5-vl-7b"], find_gpu("h100")


def request_of(*overrides: str, gpu: str = "h100", judge_latency_s: float = 0.1) -> Request:
    config = configuration.load("grpo", SPLIT, overrides)
    workload = workload_of(config, SHAPE, prompt_tokens=0, response_tokens=400, response_cv=0.6)
    return Request(config, SHAPE, find_gpu(gpu), workload, Assumptions(), judge_latency_s)


# --- rates -----------------------------------------------------------------------------------------------------------


def test_decode_step_reads_the_weights_once_and_every_cache():
    request = request_of("engine.enforce_eager=false")
    steps = decode_steps(request.config, SHAPE, H100, request.workload, Assumptions(decode_bandwidth=1.0))
    # 7.07 B weights of the language model's matrices without the input embedding, 2 bytes each, at 3.35 TB/s
    assert steps[1] == pytest.approx(7.07e9 * 2 / 3.35e12, rel=0.01)
    cache = 2 * 28 * 4 * 128 * 2 * (860 + 200)  # keys and values, layers, KV heads, head width, bytes; tokens
    assert steps[101] - steps[1] == pytest.approx(100 * cache / 3.35e12)


@pytest.mark.parametrize(
    ("overrides", "operations"),
    [
        (("learner.lora.rank=0", "learner.gradient_checkpointing=false", "objective.kl_beta=0"), 6),
        (("learner.lora.rank=0", "objective.kl_beta=0"), 8),
        (("learner.lora.rank=0",), 10),  # a pass of the reference
        ((), 8),  # LoRA: no gradients of frozen weights
        (("objective.updates_per_batch=2",), 14),
    ],
)
def test_training_operations_per_weight_and_token(overrides, operations):
    request = request_of(*overrides)
    rates = learner_rates(request.config, SHAPE, H100, request.workload, Assumptions(train_mfu=1.0), 4, 1e9)
    assert rates.token_s == pytest.approx(operations * 7.07e9 / 989e12, rel=0.01)


def test_a_small_gpu_holds_fewer_sequences_or_none():
    request = request_of()
    config, workload = request.config, request.workload
    assert max_sequences(config, SHAPE, H100, workload) == 128
    assert 0 < max_sequences(config, SHAPE, replace(H100, memory_gib=24.0), workload) < 128
    with pytest.raises(configuration.ConfigError, match="tensor_parallel_size"):
        max_sequences(config, SHAPE, replace(H100, memory_gib=16.0), workload)


# --- search ----------------------------------------------------------------------------------------------------------


def test_learner_sizes_fit_into_memory_and_machines():
    request = request_of("learner.lora.rank=0", "learner.freeze_vision=false", "groups_per_step=64")
    sizes = list(learner_sizes(request, 64))
    assert sizes == [4, 8, 16, 24, 32, 40, 48, 56]  # fewer cannot hold the optimiser's 100 GB
    assert learner_gib(request, 2) > 80 >= learner_gib(request, 4)
    assert max(learner_sizes(request_of("groups_per_step=16"), 64)) == 16
    with pytest.raises(configuration.ConfigError, match="--gpus 3: a rank of 2"):
        list(learner_sizes(request, 3))


def test_search_finds_what_trying_everything_finds():
    request = request_of()
    best = search(request, 8)[0]
    tried = [
        figures_of(simulate(request.scenario(Division(ranks, 8 - ranks, window), 40)), 3.0).settled_step_s
        for ranks in learner_sizes(request, 8)
        for window in (0, 1, 2, 4)
    ]
    assert best.settled_step_s <= 1.04 * min(tried)
    assert best.learner_ranks + best.num_engines == 8


def test_rough_estimate_is_near_the_simulation():
    request = request_of()
    for division in (Division(4, 4, 2), Division(1, 7, 2), Division(7, 1, 4)):
        scenario = request.scenario(division, 40)
        assert estimated_step_s(scenario) == pytest.approx(figures_of(simulate(scenario), 3.0).step_s, rel=0.1)


# --- command line ----------------------------------------------------------------------------------------------------


def test_plan_of_a_configuration_as_it_is(tmp_path, capsys):
    out = tmp_path / "plan.json"
    status = main(["plan", "--config", SPLIT, "--gpu", "h100", "--steps", "20", "max_staleness=1", "--json", str(out)])
    assert status == 0
    told = capsys.readouterr().out
    plan = json.loads(out.read_text())["plan"]
    assert (plan["learner_ranks"], plan["num_engines"], plan["max_staleness"]) == (4, 4, 1)
    assert f"median {plan['step_s']:.2f} s" in told and "learner rank: 20.8 GiB" in told and "train_mfu 0.35" in told
    assert plan["usd_per_1000"] == pytest.approx(plan["gpu_hours_per_1000"] * 3.0)
    assert plan["gpu_hours_per_1000"] == pytest.approx(plan["mean_step_s"] * 1000 * 8 / 3600)


def test_sweep_draws_its_figure(tmp_path, capsys):
    figure = tmp_path / "scaling.svg"
    arguments = ["--config", SPLIT, "--gpu", "h100", "--sweep", "8,16", "--steps", "10", "--mtbf-h", "20"]
    assert main(["plan", *arguments, "--scale-batch", "--figure", str(figure)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| 8 ", "| 16 "))]
    assert ["| 32 |" in rows[0], "| 64 |" in rows[1]] == [True, True]
    drawn = ElementTree.fromstring(figure.read_text())
    assert len(drawn.findall("{*}circle")) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--gpu"),
        (("--gpu", "gtx"), "--gpu gtx: unknown; use one of a100"),
        (("--gpu", "h100", "--gpus", "1"), "--gpus 1: no room"),
        (("--gpu", "h100", "--sweep", "8,many"), "--sweep 8,many"),
        (("--gpu", "h100", "--steps", "0"), "--steps 0"),
        (("--gpu", "h100", "--mtbf-h", "-1"), "--mtbf-h -1"),
        (("--gpu", "h100", "--assume", "mfu=0.3"), "there is no 'mfu'"),
        (("--gpu", "h100", "--assume", "train_mfu=much"), "'much' is no number"),
        (("--gpu", "h100", "--figure", "a.svg"), "--figure a.svg"),
        (("--gpu", "h100", "--prompt-tokens", "3000"), "--prompt-tokens 3000"),
        (("--gpu", "h100", "policy=somebody/model"), "policy = 'somebody/model'"),
        (("--gpu", "h100", "max_pixels=0"), "--prompt-tokens"),
        (("--gpu", "h100", "engine.tensor_parallel_size=3", "engine.num_gpus=3"), "does not divide"),
        (("--from-run", "nowhere"), "--config"),
        (("--gpu", "h100", "--judge-outage-every-h", "9", "--judge-outage-s", "121"), "judge.max_wait_s = 120"),
    ],
)
def test_wrong_requests_name_the_way_out(arguments, message, capsys):
    assert main(["plan", "--config", SPLIT, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_runs_that_measured_nothing_are_refused(tmp_path, capsys):
    assert main(["plan", "--from-run", str(tmp_path)]) == 2
    assert "is not the folder of a GRPO run" in capsys.readouterr().err


def test_colocated_runs_are_refused(capsys):
    colocated = str(ROOT / "configs/published/3b-colocated.yaml")
    assert main(["plan", "--config", colocated, "--gpu", "h100"]) == 2
    assert "placement.colocate" in capsys.readouterr().err
