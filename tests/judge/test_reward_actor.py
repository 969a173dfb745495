"""Reward workers as real Ray actors, with a judge behind real HTTP."""

from __future__ import annotations

import io
import time
from dataclasses import replace

import numpy as np
import pytest
import ray
from faulty_http import served
from judge_servers import SmallJudge, closeness
from PIL import Image

from sif_ray.config import GrpoConfig, JudgeConfig
from sif_ray.loop.reward_actor import RewardActor
from sif_ray.method import depth_code
from sif_ray.records import Sample

NUM_GROUPS, GROUP_SIZE, DELAY_S = 12, 3, 0.4


@pytest.fixture
def sample(photo) -> Sample:
    depth = io.BytesIO()
    Image.fromarray(depth_code.encode(np.full((8, 8), 0.5))).save(depth, format="PNG")
    box = ((0.25, 0.25, 0.75, 0.75),)
    return Sample("s", "s", "toy", "grpo", "Q?", "", "red", box, 8, 8, photo, depth.getvalue(), "exact", "image")


def test_many_groups_wait_on_the_judge_at_once(ray_local, sample, tmp_path):
    server = SmallJudge(delay_s=DELAY_S)
    with served(server.app()) as address:
        judge = JudgeConfig(kind="llm", model="judge", base_url=f"{address}/v1")
        config = replace(GrpoConfig(), judge=judge, num_reward_workers=2)
        actors = [RewardActor.options(num_cpus=1).remote(config, str(tmp_path), f"reward-{i}") for i in range(2)]
        ray.get([actor.__ray_ready__.remote() for actor in actors])
        texts = [[f"<answer>red {group} {i}</answer>" for i in range(GROUP_SIZE)] for group in range(NUM_GROUPS)]
        started_s = time.monotonic()
        calls = [actors[i % 2].score.remote(texts_G, sample, None) for i, texts_G in enumerate(texts)]
        results = ray.get(calls)
        seconds = time.monotonic() - started_s
        metrics = ray.get([actor.metrics.remote() for actor in actors])
        for actor in actors:
            ray.kill(actor)
    for group, result in enumerate(results):
        expected = [closeness("red", f"red {group} {i}") for i in range(GROUP_SIZE)]
        np.testing.assert_allclose(result.terms_G["answer_score"], expected, rtol=1e-6)
    assert seconds < NUM_GROUPS * DELAY_S / 2, "groups are judged side by side"
    assert GROUP_SIZE < server.most_at_once <= judge.max_concurrency
    assert [values["judge/scored"] for values in metrics] == [NUM_GROUPS * GROUP_SIZE / 2] * 2
    assert sorted(file.name for file in (tmp_path / "judge").glob("audit*")) == [
        "audit-reward-0.jsonl",
        "audit-reward-1.jsonl",
    ]
