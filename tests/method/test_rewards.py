from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sif_ray.method.boxes import BoxError
from sif_ray.method.depth_code import DepthError
from sif_ray.method.profile import CORRECTED
from sif_ray.method.rewards import (
    align_reward,
    answer_reward,
    binary_reward,
    box_iou_reward,
    box_reward,
    depth_reward,
    format_reward,
    search_reward,
)

FULL, TARGET, ELSEWHERE = [0, 0, 1, 1], [0.25, 0.25, 0.75, 0.75], [0.8, 0.8, 0.9, 0.9]
BOTH = pytest.mark.parametrize("profile", ["published", "corrected"])


def trace(*areas: list[list[float]], depth: float = 0.5, answer: str = "yes") -> str:
    steps = "".join(
        f"<area>{json.dumps([{'bbox_2d': box, 'depth': depth} for box in boxes])}</area>\n<text>seen</text>"
        for boxes in areas
    )
    return f"<think>{steps}</think>\n<answer>{answer}</answer>"


@BOTH
def test_format(profile: str) -> None:
    assert format_reward(trace([FULL], [TARGET]), profile) == 1.0
    assert format_reward("no trace", profile) == 0.0
    assert format_reward(None, profile) == 0.0
    assert format_reward(trace([]), profile) == (1.0 if profile == "published" else 0.0)


def test_answer_worked_by_hand() -> None:
    assert answer_reward(0.75, None) == 0.75
    assert answer_reward(0.75, 0.5) == 1.0
    assert answer_reward(0.25, 0.5) == 0.25
    assert answer_reward(0.5, 0.5) == 0.5
    assert answer_reward(1.0, 0.0) == 2.0


@pytest.mark.parametrize(
    ("score", "previous"),
    [(math.nan, None), (1.1, None), (-0.1, 0.5), ("1", None), (None, None), (True, None), (0.5, math.nan), (0.5, 3)],
)
def test_answer_refuses_what_no_judge_says(score: object, previous: object) -> None:
    with pytest.raises(ValueError, match=r"score|previous"):
        answer_reward(score, previous)


@BOTH
def test_box_reward_worked_by_hand(profile: str) -> None:
    assert box_reward(trace([FULL], [ELSEWHERE], [TARGET]), [TARGET], profile) == 2.0
    assert box_reward(trace([FULL], [TARGET]), [TARGET], profile) == 1.0  # the first real look is the last: no bonus
    assert box_reward(trace([FULL]), [TARGET], profile) == 0.25  # start = end = the whole image
    assert box_reward(trace([TARGET], [FULL]), [TARGET], profile) == 0.25  # worse in the end: no bonus, no fine
    half = [0.25, 0.25, 0.5, 0.75]
    assert box_reward(trace([half], [TARGET]), [TARGET], profile) == pytest.approx(1.5)
    assert box_iou_reward(trace([half], [TARGET]), [TARGET], profile) == 1.0
    # two boxes, one of them the whole image, are a look
    assert box_reward(trace([FULL, TARGET], [TARGET]), [TARGET], profile) == pytest.approx(1 + 1 - (0.25 + 1) / 2)
    assert box_reward(trace([TARGET], []), [TARGET], profile) == 0.0


@BOTH
@pytest.mark.parametrize(
    "text", ["", "words", None, 7, "<area>", "<area>oops</area>", "<area>{}</area>", "<area>[1]</area>"]
)
def test_nothing_to_read_is_worth_nothing(text: object, profile: str) -> None:
    assert box_reward(text, [TARGET], profile) == 0.0
    assert box_iou_reward(text, [TARGET], profile) == 0.0
    assert search_reward(text, [TARGET], profile) == 0.0
    assert depth_reward(text, np.full((2, 2), 0.5), profile) == 0.0


def test_one_unreadable_area() -> None:
    broken = "<area>oops</area>" + trace([TARGET])
    assert box_reward(broken, [TARGET], "published") == 0.0
    assert box_reward(broken, [TARGET], "corrected") == 1.0  # rubbish first is no look: no bonus
    assert box_reward(trace([TARGET]) + "<area>oops</area>", [TARGET], "corrected") == 0.0  # rubbish last is the end


def test_an_empty_first_area_pays_only_in_the_published_profile() -> None:
    text = trace([], [TARGET])
    assert box_reward(text, [TARGET], "published") == 2.0
    assert box_reward(text, [TARGET], "corrected") == 1.0


def test_the_bonus_can_be_capped() -> None:
    text = trace([ELSEWHERE], [TARGET])
    for cap, expected in ((0.0, 1.0), (0.25, 1.25), (None, 2.0)):
        profile = dataclasses.replace(CORRECTED, name="capped", box_bonus_cap=cap)
        assert box_reward(text, [TARGET], profile) == expected


@BOTH
def test_rewards_are_not_gated_by_the_format(profile: str) -> None:
    text = f'<area>[{{"bbox_2d":{TARGET},"depth":0.5}}]</area>'
    assert format_reward(text, profile) == 0.0
    assert box_reward(text, [TARGET], profile) == 1.0
    assert depth_reward(text, np.full((4, 4), 0.5), profile) == 1.0


@pytest.mark.parametrize("bad", [None, [[0.5, 0.5, 0.4, 0.6]], [[0, 0, 1, math.nan]], "box", TARGET])
def test_bad_targets_are_refused(bad: object) -> None:
    for reward in (box_reward, box_iou_reward, search_reward):
        with pytest.raises(BoxError, match="target_boxes"):
            reward(trace([TARGET]), bad)


def test_no_target_at_all() -> None:
    assert box_reward(trace([]), [], "published") == 1.0
    assert box_reward(trace([TARGET]), [], "published") == 0.0


DEPTH = np.array([[0.2, 0.2, 0.8, 0.8]] * 4)
LEFT, RIGHT = [0, 0, 0.5, 1], [0.5, 0, 1, 1]


def test_depth_worked_by_hand() -> None:
    assert depth_reward(trace([LEFT], depth=0.2), DEPTH) == 1.0
    assert depth_reward(trace([LEFT], [RIGHT], depth=0.2), DEPTH) == 0.5
    assert depth_reward(trace([LEFT, RIGHT, RIGHT], depth=0.8), DEPTH) == pytest.approx(2 / 3)
    for stated, earned in ((0.22, 1.0), (0.18, 1.0), (0.221, 0.0), (0.179, 0.0)):  # 10 % is still right
        assert depth_reward(trace([LEFT], depth=stated), DEPTH) == earned


def test_the_whole_image_earns_depth_only_in_the_published_profile() -> None:
    assert depth_reward(trace([FULL], depth=0.5), DEPTH, "published") == 1.0
    assert depth_reward(trace([FULL], depth=0.5), DEPTH, "corrected") == 0.0
    mixed = trace([FULL], [RIGHT], depth=0.5)
    assert depth_reward(mixed, DEPTH, "published") == 0.5
    assert depth_reward(mixed, DEPTH, "corrected") == 0.0


@BOTH
def test_boxes_without_a_usable_mean_count_but_earn_nothing(profile: str) -> None:
    assert depth_reward(trace([LEFT], depth=0.0), np.zeros((4, 4)), profile) == 0.0
    assert depth_reward(trace([LEFT, [2, 2, 3, 3], [0.4, 0.4, 0.1, 0.5]], depth=0.2), DEPTH, profile) == pytest.approx(
        1 / 3
    )
    without_depth = trace([LEFT], depth=0.2) + '<area>[{"bbox_2d":[0,0,0.5,1]}]</area>'
    assert depth_reward(without_depth, DEPTH, profile) == 1.0


@pytest.mark.parametrize(
    "bad", [np.full((2, 2), np.nan), np.zeros((0, 0)), np.zeros((2, 2, 3)), np.full((2, 2), 2.0), None, "depth"]
)
def test_bad_depth_maps_are_refused(bad: object) -> None:
    for text in (trace([LEFT]), "no trace"):
        with pytest.raises(DepthError):
            depth_reward(text, bad)


@BOTH
def test_search(profile: str) -> None:
    half = [0.25, 0.25, 0.5, 0.75]
    assert search_reward(trace([FULL], [half], [TARGET]), [TARGET], profile) == 1.0
    assert search_reward(trace([FULL], [ELSEWHERE], [TARGET]), [TARGET], profile) == 0.0
    assert search_reward(trace([TARGET], [TARGET]), [TARGET], profile) == 0.0
    assert search_reward(trace([TARGET]), [TARGET], profile) == 0.0


def test_binary() -> None:
    assert binary_reward(trace([FULL], answer=" the cup "), "the cup") == 1.0
    assert binary_reward(trace([FULL], answer="The cup"), "the cup") == 0.0
    assert binary_reward("the cup", "the cup") == 0.0
    assert binary_reward(None, "") == 0.0


def test_align() -> None:
    assert align_reward(0.5, 0.5) == 0.25
    for bad in ((math.nan, 1.0), (1.0, 1.5), (None, 1.0)):
        with pytest.raises(ValueError, match="judge"):
            align_reward(*bad)


numbers = st.floats(-1, 2) | st.sampled_from([0, 1, 0.5, 10**30, math.nan, math.inf, True, None, "x"])
values = st.fixed_dictionaries({}, optional={"bbox_2d": st.lists(numbers, max_size=5) | numbers, "depth": numbers})
areas = st.lists(st.lists(values | numbers, max_size=3).map(json.dumps) | st.text(max_size=5), max_size=4)


@settings(max_examples=200)
@given(areas, st.sampled_from(["published", "corrected"]))
def test_anything_a_policy_writes_is_worth_something_in_range(contents: list[str], profile: str) -> None:
    text = "".join(f"<area>{content}</area><text>a</text>" for content in contents)
    assert 0 <= box_iou_reward(text, [TARGET], profile) <= 1
    assert 0 <= box_reward(text, [TARGET], profile) <= 2
    assert 0 <= depth_reward(text, DEPTH, profile) <= 1
    assert search_reward(text, [TARGET], profile) in (0.0, 1.0)
    assert format_reward(f"<think>{text}</think><answer>a</answer>", profile) in (0.0, 1.0)


@pytest.mark.parametrize("num_boxes", [256, 20_000])
def test_a_megabyte_of_boxes_is_scored(num_boxes: int) -> None:
    rng = np.random.default_rng(0)
    corners = np.sort(rng.random((num_boxes, 2, 2)), axis=1).reshape(num_boxes, 4).tolist()
    text = trace(corners) if num_boxes > 256 else trace(*([corners] * 10))
    assert 0 <= box_reward(text, [TARGET]) <= 2
    assert 0 <= depth_reward(text, np.full((64, 64), 0.5)) <= 1
