"""The rewarder against direct calls of the method's functions."""

from __future__ import annotations

import asyncio
import io

import numpy as np
import pytest
from PIL import Image

from sif_ray.config import RewardConfig
from sif_ray.depth.encoding import depth_png, gray_png
from sif_ray.judge.exact import ExactMatchJudge
from sif_ray.judge.outcome import Failed, JudgeUnavailable, Unavailable
from sif_ray.judge.scoring import read_depth, read_depth_image
from sif_ray.loop.rewarder import GroupScores, Rewarder, ScoringFailed
from sif_ray.method import depth_code, rewards
from sif_ray.records import Sample

BOX = (0.25, 0.25, 0.75, 0.75)
DEPTH_REL = np.tile(np.linspace(0, 1, 64), (64, 1))
TEXTS = [
    '<think><area>[{"bbox_2d":[0.25,0.25,0.75,0.75],"depth":0.5}]</area><text>the ball</text></think>'
    "<answer>three</answer>",
    '<think><area>[{"bbox_2d":[0.25,0.25,0.5,0.5],"depth":0.9}]</area><text>a box</text></think><answer>2</answer>',
    "no trace at all",
    '<think><area>[{"bbox_2d":[0,0,0.5,1],"depth":0.25}]</area><text>x</text>',
]


def sample(answer: str = "3") -> Sample:
    buffer = io.BytesIO()
    Image.fromarray(depth_code.encode(DEPTH_REL)).save(buffer, format="PNG")
    return Sample(
        "s", "s", "toy", "grpo", "How many?", "count", answer, (BOX,), 64, 64, b"", buffer.getvalue(), "exact", "image"
    )


def score(weights: RewardConfig, profile: str = "corrected", previous: float | None = None, **changes) -> GroupScores:
    judge = changes.pop("judge", ExactMatchJudge())
    outcome = asyncio.run(Rewarder(weights, profile, judge).score(TEXTS, sample(**changes), previous))
    assert isinstance(outcome, GroupScores)
    return outcome


@pytest.mark.parametrize("profile", ["corrected", "published"])
@pytest.mark.parametrize("previous", [None, 0.25])
def test_terms_are_those_of_the_method(profile, previous):
    terms_G = score(RewardConfig(), profile, previous).terms_G
    answers = [1.0, 0.0, 0.0, 0.0]
    expected = {
        "format": [rewards.format_reward(text, profile) for text in TEXTS],
        "answer": [rewards.answer_reward(answer, previous) for answer in answers],
        "box": [rewards.box_reward(text, [BOX], profile) for text in TEXTS],
        "search": [rewards.search_reward(text, [BOX], profile) for text in TEXTS],
        "binary": [rewards.binary_reward(text, "3") for text in TEXTS],
        "answer_score": answers,
        "iou_last": [rewards.box_iou_reward(text, [BOX], profile) for text in TEXTS],
        "depth": [rewards.depth_reward(text, DEPTH_REL, profile) for text in TEXTS],
    }
    assert terms_G.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(terms_G[name], values, rtol=1e-6, err_msg=name)
    assert terms_G["answer"][0] == (1.75 if previous else 1.0)


@pytest.mark.parametrize("profile", ["corrected", "published"])
def test_an_indexed_depth_image_earns_what_its_colours_do(profile):
    near_to_far = depth_png(DEPTH_REL)
    with Image.open(io.BytesIO(near_to_far)) as image:
        other_palette = image.convert("RGB").quantize(64)
    buffer = io.BytesIO()
    other_palette.save(buffer, format="PNG")
    for encoded in (near_to_far, buffer.getvalue(), gray_png(DEPTH_REL)):
        levels, depth_rel = read_depth(encoded, profile), read_depth_image(encoded, profile)
        assert (levels.dtype == np.uint8) == (encoded is near_to_far)
        np.testing.assert_allclose(levels / 255 if encoded is near_to_far else levels, depth_rel, atol=1e-12)
        for text in TEXTS:
            expected = rewards.depth_reward(text, depth_rel, profile)
            assert rewards.checked_depth_reward(text, levels, profile) == expected


def test_reward_is_the_weighted_sum():
    scores = score(RewardConfig(format=0.5, answer=1.0, box=2.0, depth=0.25))
    terms = scores.terms_G
    by_hand = 0.5 * terms["format"] + terms["answer"] + 2 * terms["box"] + 0.25 * terms["depth"]
    np.testing.assert_allclose(scores.rewards_G, by_hand, rtol=1e-6)


@pytest.mark.parametrize("profile", ["corrected", "published"])
def test_ablation_terms_count_only_when_asked_for(profile):
    text = (
        '<think><area>[{"bbox_2d":[0,0,1,1],"depth":0.5}]</area><text>all</text>'
        '<area>[{"bbox_2d":[0.25,0.25,0.75,0.75],"depth":0.5}]</area><text>it</text></think><answer>3</answer>'
    )

    async def reward(weights: RewardConfig) -> float:
        scores = await Rewarder(weights, profile, ExactMatchJudge()).score([text], sample(), None)
        return float(scores.rewards_G[0])

    paper = asyncio.run(reward(RewardConfig()))
    assert asyncio.run(reward(RewardConfig(search=0.5))) == pytest.approx(paper + 0.5)  # the look got better
    assert asyncio.run(reward(RewardConfig(binary=0.25))) == pytest.approx(paper + 0.25)  # "3" is "3"
    no_others = RewardConfig(format=0, answer=0, box=0, depth=0, search=1, binary=1)
    np.testing.assert_allclose(score(no_others, profile).rewards_G, 0)  # "three" is not "3"; one look is no search


def test_depth_gate_follows_the_last_boxes():
    only_depth = {"format": 0.0, "answer": 0.0, "box": 0.0}
    free, gated = score(RewardConfig(**only_depth)), score(RewardConfig(**only_depth, gate_depth_by_iou=True))
    gate_G = np.minimum(1, 2 * free.terms_G["iou_last"])
    assert 0 < gate_G[3] < 1
    np.testing.assert_allclose(gated.rewards_G, free.rewards_G * gate_G, rtol=1e-6)


class BrokenJudge:
    def __init__(self, outcome):
        self.outcome = outcome

    async def judge(self, question, answer, prediction, image):
        return self.outcome


def test_failed_judge_gives_no_reward_at_all():
    judge = BrokenJudge(Failed("unreadable reply"))
    outcome = asyncio.run(Rewarder(RewardConfig(), "corrected", judge).score(TEXTS, sample(), None))
    assert outcome == ScoringFailed("judge failed: unreadable reply", retry=True)


def test_judge_that_answers_nobody_is_an_error():
    judge = BrokenJudge(Unavailable("HTTP 401", "judge: 'x' at y answers no call"))
    with pytest.raises(JudgeUnavailable, match="judge: 'x' at y answers no call"):
        asyncio.run(Rewarder(RewardConfig(), "corrected", judge).score(TEXTS, sample(), None))


def test_sample_without_reference_is_not_tried_again():
    outcome = asyncio.run(Rewarder(RewardConfig(), "corrected", ExactMatchJudge()).score(TEXTS, sample(""), None))
    assert isinstance(outcome, ScoringFailed) and not outcome.retry
