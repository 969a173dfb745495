"""Streamed and whole outputs are divided alike, wherever they are cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from serve_fakes import TRACE

from sif_ray.method.trace import find_answer
from sif_ray.serve.answer_split import AnswerSplit, Part, split_answer

PIECES = st.sampled_from(["<answer>", "</answer>", "<", "</", "<ans", "answer>", " ", "\n", "red", "ball", "<think>"])


def test_a_trace_is_divided_into_thinking_and_answer():
    part = split_answer(TRACE)
    assert part.answer == find_answer(TRACE) == "red ball"
    assert part.thinking == TRACE.partition("<answer>")[0]


def test_an_answer_that_is_cut_off_is_an_answer_and_no_answer_is_none():
    assert split_answer("<think>a</think>\n<answer> red b") == Part("<think>a</think>\n", "red b")
    assert split_answer("<think>a <ans") == Part("<think>a <ans", "")
    assert split_answer("x<answer> </answer>y") == Part("xy", "")


@given(st.lists(PIECES, max_size=12).map("".join), st.data())
def test_where_an_output_is_cut_into_pieces_changes_nothing(text, data):
    split, parts, rest = AnswerSplit(), [], text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        parts.append(split.feed(rest[:size]))
        rest = rest[size:]
    parts.append(split.end())
    joined = Part("".join(part.thinking for part in parts), "".join(part.answer for part in parts))
    assert joined == split_answer(text)

    before, opened, after = text.partition("<answer>")  # the same by hand
    inside, _, behind = after.partition("</answer>")
    assert joined == Part(before + behind, inside.strip()) if opened else Part(text, "")
