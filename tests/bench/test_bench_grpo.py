"""The suites `grpo` and `overlap` on loads so small that their figures mean nothing."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from dataclasses import replace

import pytest
import torch
from openai import OpenAI

from sif_ray.bench import grpo, overlap
from sif_ray.bench.answering_policy import write_answering_policy
from sif_ray.bench.chat_server import chat_server
from sif_ray.bench.cpu import CpuWatch
from sif_ray.bench.lone_stages import Lone, LoneStages
from sif_ray.bench.stages_at_once import finished_while_both_worked
from sif_ray.bench.toy_dataset import SPLIT, write_dataset
from sif_ray.bench.training_run import busy_seconds, make_config, read_middle
from sif_ray.bench.trl_steps import reward_function
from sif_ray.config import PromptConfig, RewardConfig
from sif_ray.datagen.dataset import read_samples
from sif_ray.judge.exact import ExactMatchJudge
from sif_ray.judge.llm import Question
from sif_ray.judge.reply import read_score
from sif_ray.loop.rewarder import Rewarder
from sif_ray.observe.metrics import MetricsLog
from sif_ray.observe.timeline import Span, Timeline
from sif_ray.policy.model import load_policy
from sif_ray.policy.processor import PolicyProcessor

TINY = {
    "steps": 8,
    "groups_per_step": 2,
    "group_size": 4,
    "max_num_seqs": 16,
    "max_staleness": 1,
    "judge_latency_s": 0.05,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("bench") / "data", 4)


@pytest.fixture(scope="module")
def samples(dataset):
    return list(read_samples(str(dataset), SPLIT))


@pytest.mark.parametrize("long_tailed", [False, True])
def test_completions_have_an_answer_and_known_lengths(tmp_path, samples, long_tailed):
    policy = write_answering_policy(tmp_path / "policy", long_tailed=long_tailed)
    processor, model = PolicyProcessor(policy), load_policy(policy)
    encoded = processor.encode_prompt(samples[0].question, samples[0].prompt_images(True), PromptConfig())
    prompt = torch.tensor([encoded.token_ids_P] * 32)
    torch.manual_seed(0)
    made = model.generate(
        input_ids=prompt,
        mm_token_type_ids=(prompt == processor.image_token_id).int(),
        pixel_values=torch.from_numpy(encoded.pixel_values).repeat(32, 1),
        image_grid_thw=torch.tensor(encoded.image_grid_thw).repeat(32, 1),
        do_sample=True,
        top_k=0,
        max_new_tokens=40,
        eos_token_id=processor.eos_token_id,
        pad_token_id=processor.pad_token_id,
    )[:, prompt.shape[1] :]
    texts = [processor.decode(row.tolist()) for row in made]
    answers = {re.match(r"<answer>([A-Z][a-z][0-9].)</answer>", text)[1] for text in texts}
    assert len(answers) >= 31
    ended = (made == processor.eos_token_id).any(1).sum()
    assert 8 < ended < 32 if long_tailed else ended == 0


def test_the_server_scores_answers_by_what_they_are():
    with chat_server(0.01) as server, OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
        requests = [Question("m", text, b"").request(64) for text in ("a", "b", "c", "d", "a")]
        scores = [
            read_score(client.chat.completions.create(**request).choices[0].message.content) for request in requests
        ]
    assert scores[0] == scores[4]
    assert len(set(scores)) > 1


def test_stages_are_busy_when_anything_of_their_kind_is_under_way():
    spans = [
        Span("engine 0", "generate", 0.0, 4.0),
        Span("engine 0", "generate", 3.0, 5.0),
        Span("learner 0", "train", 9.0, 12.0),
        Span("learner 0", "wait", 0.0, 9.0),
    ]
    assert busy_seconds(spans, 1.0, 10.0) == {"generate": 4.0, "score": 0.0, "train": 1.0, "sync": 0.0}


def test_rates_are_those_of_the_steps_between_start_and_end(tmp_path):
    config = make_config(tmp_path, "toy", grpo.Load(**TINY))
    with contextlib.closing(Timeline(tmp_path / "timeline.jsonl")) as timeline:
        timeline.span("engine 0", "generate", 51.0, 53.0, prompt_tokens=57)
    with MetricsLog(tmp_path / "metrics.jsonl") as metrics:
        for step in range(1, 9):
            idle = {"learner_idle_share": 0.5, "engine_idle_share": 0.25, "staleness_max": 1.0, "parity_mean_abs": 0.0}
            metrics.log(step, {"trained_tokens": 100.0, "prompt_cache_share": 0.5, **idle})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    times_s = [0.0, 50.0, 52.0, 54.0, 56.0, 58.0, 90.0, 99.0]
    timed = [line | {"time_s": time_s} for line, time_s in zip(lines, times_s, strict=True)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timed))
    middle = read_middle(tmp_path, config, 2, lambda begin_s, end_s: end_s - begin_s)
    assert (middle.steps, middle.seconds, middle.completions_per_s, middle.tokens_per_s) == (4, 8.0, 4.0, 50.0)
    assert middle.cores == 8.0
    assert (middle.computed_prompts_per_group, middle.prompt_tokens, middle.busiest_s) == (2.0, 57, 2.0)
    whole = read_middle(tmp_path, config, 0, lambda begin_s, end_s: 1.0)
    assert (whole.steps, whole.seconds, whole.tokens_per_s) == (8, 99.0 - 51.0, 800.0 / 48.0)


def test_the_cpu_seconds_of_this_process_are_its_own():
    begin_s = time.time()
    with CpuWatch(every_s=0.05) as watch:
        until = time.process_time() + 0.3
        while time.process_time() < until:
            pass
    assert 0.25 < watch.seconds["this process"] <= watch.total_s < 5
    half_s = (time.time() - begin_s) / 2
    halves = watch.cores(begin_s, begin_s + half_s) + watch.cores(begin_s + half_s, begin_s + 2 * half_s)
    assert halves * half_s == pytest.approx(watch.total_s)


def test_the_bound_is_the_busiest_stage_or_all_cores():
    stages = LoneStages(Lone(0.2, 0.2), Lone(0.01, 0.01), Lone(9.0, 9.0), Lone(0.1, 0.1), 1.0)
    assert stages.bound_completions_per_s(num_cpus=2) == pytest.approx(1 / 0.2)
    assert stages.bound_completions_per_s(num_cpus=1) == pytest.approx(1 / 0.31)


def test_at_once_only_what_ends_while_both_work_counts():
    class TwoCores(CpuWatch):
        def cores(self, begin_s, end_s):
            return 1.5 if (begin_s, end_s) == (100.0, 103.0) else 0.0

    found = finished_while_both_worked(TwoCores(), 100.0, 4.0, [101.0, 103.0, 105.0], each=8)
    assert (found.wall_s, found.cpu_s) == (3.0 / 16, 1.5 * 3.0 / 16)
    with pytest.raises(RuntimeError, match="nothing ended within 4 s"):
        finished_while_both_worked(TwoCores(), 100.0, 4.0, [105.0], each=8)


async def test_trl_is_given_the_rewards_of_the_method(tmp_path, samples):
    texts = [f"<think></think><answer>{answer}</answer>" for answer in ("nothing", samples[0].answer)]
    config = make_config(tmp_path, "toy", grpo.Load(**TINY))
    request = grpo.trl_request(config, grpo.Load(**TINY), output="", judge_url="")
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    named = {sample.sample_id: sample for sample in samples}
    rewards = reward_function(request, named)(completions=completions, sample_id=[samples[0].sample_id] * 2)
    ours = await Rewarder(RewardConfig(), config.profile, ExactMatchJudge()).score(texts, samples[0], None)
    assert rewards == pytest.approx(ours.rewards_G.tolist())
    assert rewards[1] > rewards[0]
    with chat_server(0.01) as server:
        judged = reward_function(replace(request, judge_url=server.base_url), named)
        judged(completions=completions, sample_id=[samples[0].sample_id] * 2)
    assert len(server.replied_s) == 2


@pytest.mark.slow  # starts three engines one after the other
@pytest.mark.timeout(900)
def test_whole_steps_are_measured_and_goals_without_trl_are_missed(ray_local, monkeypatch, caplog):
    monkeypatch.delenv(grpo.TRL_PYTHON, raising=False)
    with caplog.at_level(logging.WARNING, logger="sif_ray.bench"):
        found = grpo.measure(1, grpo.Load(**TINY, max_tokens=16, lone_steps=2, at_once_s=3.0))
    assert "TRL is not measured" in caplog.text
    assert [goal.ok for goal in found.goals[:2]] == [False, False]
    assert all("not measured" in goal.name for goal in found.goals[:2])
    assert found.goals[2].value > 0
    assert found.figures["prompts_computed_per_group"]["learner"]["values"] == [1.0]
    assert 1 <= found.figures["prompts_computed_per_group"]["engine"]["median"] < 4
    assert found.figures["ours"]["steps"]["values"] == [4]
    at_once = found.figures["stages_at_once"]
    assert all(at_once[name]["completions_per_s"]["min"] > 0 for name in ("generation", "update"))
    json.dumps(found.figures, allow_nan=False)


@pytest.mark.slow  # starts two engines one after the other
@pytest.mark.timeout(900)
def test_both_modes_do_the_same_work(ray_local):
    found = overlap.measure(1, overlap.Load(**TINY, max_tokens=64))
    assert found.goals[0].value > 0
    modes = [found.figures[mode] for mode in ("asynchronous", "on_policy")]
    assert [mode["steps"]["values"] for mode in modes] == [[8], [8]]
    assert modes[1]["staleness_max"]["max"] == 0
    assert all(0 <= mode[f"{part}_idle_share"]["median"] < 1 for mode in modes for part in ("learner", "engine"))
    assert found.goals[1].value >= 1
