"""What is shown of an unfinished output only grows, and ends as the trace that the reader of traces finds."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_fakes import TRACE

from sif_ray.method.trace import AreaBox, Step, Trace, TraceError, parse
from sif_ray.serve.growing_trace import GrowingTrace

NUMBERS = st.integers(0, 1000).map(lambda thousandth: thousandth / 1000)
WORDS = st.text(st.sampled_from("a <>/&\n é."), max_size=12).map(lambda text: f"x{text}y")
BOXES = st.builds(
    lambda left, top, depth: AreaBox((left / 2, top / 2, left / 2 + 0.5, top / 2 + 0.5), depth),
    *(st.integers(0, 500).map(lambda thousandth: thousandth / 500) for _ in range(2)),
    NUMBERS,
)
TRACES = st.builds(
    Trace,
    st.lists(st.builds(Step, st.lists(BOXES, min_size=1, max_size=3).map(tuple), WORDS), min_size=1).map(tuple),
    WORDS,
)
TAGS = ["<think>", "</think>", "<area>", "</area>", "<text>", "</text>", "<answer>", "</answer>"]
BODIES = ['[{"bbox_2d":[0.1,0.2,0.3,0.4],"depth":0.5}]', '[{"bbox_2d":[0,0,9,9]}]', "[", "{", "</t", "<", " ", "red"]
PIECES = st.sampled_from(TAGS + BODIES)
OUTPUTS = st.one_of(TRACES.map(lambda trace: trace.render()), st.lists(PIECES, max_size=24).map("".join), st.text())


@settings(deadline=None)
@given(OUTPUTS, st.sampled_from(["corrected", "published"]), st.data())
def test_steps_only_grow_and_end_as_the_trace(text, profile, data):
    trace, rest = GrowingTrace(), text
    while rest:
        size = data.draw(st.integers(1, min(len(rest), 40)))
        steps, answer = list(trace.steps), trace.answer
        trace.feed(rest[:size])
        rest = rest[size:]
        assert len(trace.steps) >= len(steps)
        for before, after in zip(steps, trace.steps, strict=False):
            assert after.boxes == before.boxes
            assert after.text.startswith(before.text)
        assert trace.steps[: len(steps) - 1] == steps[:-1]  # only the last may have grown
        assert trace.answer.startswith(answer)
    with contextlib.suppress(TraceError):
        assert Trace(tuple(trace.steps), trace.answer) == parse(text, profile)

    whole = GrowingTrace()
    whole.feed(text)
    assert (whole.steps, whole.answer) == (trace.steps, trace.answer)


@pytest.mark.parametrize(
    ("last", "texts", "answer"),
    [
        ("0.500}]", [], ""),
        ("0.500}]</area>", [""], ""),
        ("<text>Look", ["Look"], ""),
        ("image.</te", ["Look at the whole image."], ""),
        ("0.250}]</area>", ["Look at the whole image.", ""], ""),
        ("Here is ", ["Look at the whole image.", "Here is"], ""),
        ("<answer>red", ["Look at the whole image.", "Here is the red ball."], "red"),
        ("</answer>", ["Look at the whole image.", "Here is the red ball."], "red ball"),
    ],
)
def test_what_is_shown_up_to_these_words(last, texts, answer):
    trace = GrowingTrace()
    trace.feed(TRACE.partition(last)[0] + last)
    assert [step.text for step in trace.steps] == texts
    assert trace.answer == answer
