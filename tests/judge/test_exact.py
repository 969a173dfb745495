"""The exact-match judge on answers whose verdict a person would not argue about."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sif_ray.judge.exact import ExactMatchJudge
from sif_ray.judge.outcome import Abstained, Scored

OPTIONS = "Which one is closer? (A) the red ball (B) the blue box (C) neither"


def verdict(answer: str, prediction: str, question: str = "What is it?", **judge) -> float:
    outcome = asyncio.run(ExactMatchJudge(**judge).judge(question, answer, prediction, b""))
    assert isinstance(outcome, Scored)
    return outcome.score


@pytest.mark.parametrize(
    ("answer", "prediction", "score"),
    [
        ("red ball", "The red ball.", 1),
        ("red ball", "RED  BALL!", 1),
        ("red ball", "a red box", 0),
        ("red ball", "", 0),
        ("red ball", "ball red", 0),
        ("3", "three", 1),
        ("3", "There are 3 cups.", 1),
        ("three", "3.0", 1),
        ("3", "3 or 4", 0),
        ("3", "13", 0),
        ("21", "twenty-one", 1),
        ("20 1", "twenty one", 0),
        ("1,200", "1200", 1),
        ("0.5", ".50", 1),
        ("-3", "3", 0),
        ("3 cups", "three cups", 1),
        ("yes", "Yes, it is.", 1),
        ("yes", "No", 0),
        ("no", "No, there is none", 1),
        ("no", "now", 0),
        ("gray", "grey", 1),
        ("gray bike", "the grey bicycle", 1),
        ("the", "the", 1),
        ("it's", "its", 1),
        ("café", "CAFE\u0301", 1),
    ],
)
def test_short_answers(answer, prediction, score):
    assert verdict(answer, prediction) == score


@pytest.mark.parametrize(
    ("answer", "prediction", "score"),
    [
        ("B", "B", 1),
        ("B", "(b)", 1),
        ("B", "b. the blue box", 1),
        ("B", "Option B", 1),
        ("B", "blue box", 1),
        ("B", "A", 0),
        ("B", "the red ball", 0),
        ("B", "a blue box", 1),
        ("(A) the red ball", "A", 1),
        ("the red ball", "A", 1),
        ("A", "a blue box", 0),
    ],
)
def test_options(answer, prediction, score):
    assert verdict(answer, prediction, OPTIONS) == score


def test_option_letter_without_listed_options():
    assert verdict("B", "b)") == 1
    assert verdict("A", "a dog") == 0


def test_synonyms_are_an_argument():
    assert verdict("mug", "cup", synonyms=[("cup", "mug")]) == 1
    assert verdict("gray", "grey", synonyms=[]) == 0


def test_no_reference_is_no_verdict():
    assert isinstance(asyncio.run(ExactMatchJudge().judge("What?", " ", "x", b"")), Abstained)


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40))
def test_any_text_has_a_verdict_and_equals_itself(question, answer, prediction):
    judge = ExactMatchJudge()
    assert judge.same(question, answer, prediction) in (True, False)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", ["9" * 400_000, "(A" * 200_000, "one " * 100_000, "twenty " * 60_000])
def test_long_text_is_no_trap(text):
    assert ExactMatchJudge().same(text, "3", text) is False
