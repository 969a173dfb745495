from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from sif_ray.config import RewardConfig
from sif_ray.evaluate.metrics import TERMS, chances, majority_shares, score_text
from sif_ray.judge.exact import ExactMatchJudge
from sif_ray.judge.scoring import read_depth_image, weighted_total
from sif_ray.method import depth_code
from sif_ray.records import Sample

DEPTH = np.tile(np.linspace(0, 1, 100), (100, 1))  # nearer to the left
SAMPLE = Sample(
    sample_id="a", scene_id="s", dataset="test", split="heldout", question="What is red?", question_type="colour",
    answer="the ball", boxes=((0.1, 0.1, 0.5, 0.5),), width=100, height=100, image=b"", depth_image=b"",
    depth_source="exact", source_frame="image",
)  # fmt: skip


def trace(box: str, depth: str, answer: str) -> str:
    whole = '<area>[{"bbox_2d":[0,0,1,1],"depth":0.5}]</area><text>All.</text>'
    area = f'<area>[{{"bbox_2d":[{box}],"depth":{depth}}}]</area><text>Here.</text>'
    return f"<think>{whole}{area}</think><answer>{answer}</answer>"


def score(text: str, weights: RewardConfig | None = None) -> dict[str, float]:
    return score_text(SAMPLE, DEPTH, text, "corrected", weights or RewardConfig(), ExactMatchJudge())


def test_a_perfect_output():
    terms = score(trace("0.1,0.1,0.5,0.5", "0.3", "Ball"))
    assert terms == pytest.approx({"format": 1, "answer": 1, "box": 1, "depth": 1, "iou_last": 1, "total": 4})
    assert tuple(terms) == TERMS


def test_each_term_is_lost_by_its_own_fault():
    wrong = score(trace("0.5,0.1,0.9,0.5", "0.3", "cone"))
    assert wrong == pytest.approx({"format": 1, "answer": 0, "box": 0, "depth": 0, "iou_last": 0, "total": 1})


@pytest.mark.parametrize("text", ["", "<answer>", "ball", "<think></think>"])
def test_an_unreadable_output_scores_nothing(text):
    assert set(score(text).values()) == {0.0}


def test_an_ill_formed_output_keeps_what_can_be_read():
    terms = score('<answer>ball</answer><area>[{"bbox_2d":[0.1,0.1,0.5,0.5]}]</area>')
    assert (terms["format"], terms["answer"], terms["iou_last"], terms["depth"]) == (0, 1, 1, 0)


def test_weights_and_the_gate_apply_to_the_total():
    text = trace("0.1,0.1,0.3,0.5", "0.2", "cone")
    assert score(text)["iou_last"] == pytest.approx(0.5)
    weights = RewardConfig(format=2, answer=5, box=0, depth=3)
    assert score(text, weights)["total"] == pytest.approx(5)
    half = trace("0.1,0.1,0.2,0.5", "0.15", "cone")
    gated = RewardConfig(format=0, answer=0, box=0, depth=1, gate_depth_by_iou=True)
    assert score(half, gated)["total"] == pytest.approx(2 * 0.25)
    assert weighted_total(score(half), gated) == pytest.approx(0.5)


def test_the_depth_image_is_read_back_as_it_was_written():
    buffer = io.BytesIO()
    Image.fromarray(depth_code.encode(DEPTH)).save(buffer, format="PNG")
    assert np.abs(read_depth_image(buffer.getvalue(), "corrected") - DEPTH).max() <= 0.5 / 255 + 1e-9


def test_chance_is_the_designed_one_or_the_best_constant_answer():
    answers = {"colour": ["red", "Red", "blue"], "count": ["1", "2"]}
    samples = [
        dataclasses.replace(SAMPLE, question_type=kind, answer=answer)
        for kind, given in answers.items()
        for answer in given
    ]
    assert majority_shares(samples) == pytest.approx({"colour": 2 / 3, "count": 1 / 2})
    assert chances(samples, {"count": 1 / 3}) == pytest.approx({"colour": 2 / 3, "count": 1 / 3})
