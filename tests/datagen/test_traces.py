"""Frames and traces of the template teacher: every row is right or says what is wrong with it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_drafts import RAMP, toy_drafts, with_depth

from sif_ray.config import GenerateConfig
from sif_ray.datagen.checks import EXPLANATIONS, faults, form_faults
from sif_ray.datagen.drafts import Draft
from sif_ray.datagen.teacher import CLOSER_LOOK, ELSEWHERE, ONE_PART, WHOLE_IMAGE, frame_sentences
from sif_ray.datagen.traces import ANY_NAME, TemplateTraces
from sif_ray.depth.encoding import read_gray
from sif_ray.method.boxes import FULL_IMAGE
from sif_ray.method.depth_code import box_mean
from sif_ray.method.trace import parse
from sif_ray.records import Sample

CONFIG = GenerateConfig(splits={"train": 12}, decimals=2)
BLANK = Sample("s-1", "s", "own", "", "How many?", "", "1", ((0.2, 0.2, 0.4, 0.4),), 112, 112, b"", b"", "", "image")


@pytest.fixture(scope="module")
def sample() -> Sample:
    """An accepted row with two decimals."""
    return TemplateTraces(CONFIG)(toy_drafts(CONFIG)[:1])[0].sample


def stored_ramp() -> np.ndarray:
    """`RAMP` as its images hold it."""
    return read_gray(with_depth(Draft(BLANK)).depth_gray)


@pytest.mark.parametrize("profile", ["corrected", "published"])
@pytest.mark.parametrize("decimals", [2, 3])
def test_toy_rows_are_accepted_and_repeat(profile, decimals):
    config = replace(CONFIG, profile=profile, decimals=decimals)
    drafts = toy_drafts(config)
    made = TemplateTraces(config)(drafts)
    assert [draft.reasons for draft in made] == [()] * len(drafts)
    assert TemplateTraces(config)(drafts[::-1]) == made[::-1], "a row is the same whatever is made with it"
    for draft, original in zip(made, drafts, strict=True):
        assert replace(draft.sample, frames=(), trace="") == original.sample
        trace = parse(draft.sample.trace, profile)
        assert [box.bbox_2d for box in trace.steps[0].boxes] == [FULL_IMAGE]
        assert trace.answer == draft.sample.answer
        for stated, evidence in zip(trace.steps[-1].boxes, draft.sample.boxes, strict=True):
            np.testing.assert_allclose(stated.bbox_2d, evidence, atol=0.011 if profile == "published" else 0.006)
            assert stated.depth == pytest.approx(np.mean(stated.bbox_2d[::2]), abs=0.02)  # the ramp's mean: its middle


def test_frames_follow_from_seed_and_sample_id():
    boxes = ((0.1, 0.1, 0.2, 0.2),)

    def frames(config: GenerateConfig) -> list[tuple]:
        drafts = [with_depth(Draft(replace(BLANK, sample_id=f"s-{i}", boxes=boxes))) for i in range(20)]
        return [draft.sample.frames for draft in TemplateTraces(config)(drafts)]

    assert frames(CONFIG) == frames(CONFIG)
    assert frames(CONFIG) != frames(replace(CONFIG, seed=1))
    assert len(set(frames(CONFIG))) > 3


def test_some_rows_look_elsewhere_first_and_some_do_not():
    config = replace(CONFIG, splits={"train": 40})
    elsewhere = [ELSEWHERE in draft.sample.trace for draft in TemplateTraces(config)(toy_drafts(config))]
    assert 0.02 < np.mean(elsewhere) < 0.5  # where the evidence leaves room for it, half of the time


@st.composite
def boxes_in_image(draw) -> tuple[float, float, float, float]:
    x1, x2 = sorted(draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    y1, y2 = sorted(draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    return (x1, y1, x2, y2)


@given(
    boxes=st.lists(boxes_in_image(), min_size=1, max_size=4),
    size=st.tuples(st.integers(16, 2000), st.integers(16, 2000)),
    decimals=st.integers(1, 3),
    profile=st.sampled_from(["corrected", "published"]),
)
def test_any_boxes_give_a_right_row_or_a_reason(boxes, size, decimals, profile):
    width, height = size
    config = GenerateConfig(decimals=decimals, profile=profile)
    sample = replace(BLANK, boxes=tuple(boxes), width=width, height=height, profile=profile)
    [draft] = TemplateTraces(config)([with_depth(Draft(sample))])
    thin = min(min(x2 - x1, y2 - y1) for x1, y1, x2, y2 in boxes) <= 2 * 10**-decimals + 2 / min(size)
    assert not draft.reasons or thin, "only boxes that rounding may swallow are refused"
    if draft.reasons:
        return
    trace, depth_rel = parse(draft.sample.trace, profile), stored_ramp()
    assert [[box.bbox_2d for box in step.boxes] for step in trace.steps] == [list(f) for f in draft.sample.frames]
    for box in (box for step in trace.steps for box in step.boxes):
        x1, y1, x2, y2 = box.bbox_2d
        pixels = depth_rel[math.floor(y1 * 112) : math.ceil(y2 * 112), math.floor(x1 * 112) : math.ceil(x2 * 112)]
        assert box.depth == pytest.approx(pixels.mean(), abs=0.51 * 10**-decimals)


def test_sentences_say_what_a_frame_shows():
    evidence = [(0.1, 0.1, 0.2, 0.2), (0.4, 0.4, 0.5, 0.5)]
    frames = [
        [FULL_IMAGE],
        [(0.7, 0.7, 0.9, 0.9)],
        [(0.05, 0.05, 0.6, 0.6)],
        [(0, 0, 0.3, 0.3), (0.3, 0.3, 0.6, 0.6)],
        evidence,
    ]
    pair = "Here is the red ball and the blue box."
    assert frame_sentences(frames, ("red ball", "blue box")) == [WHOLE_IMAGE, ELSEWHERE, ONE_PART, CLOSER_LOOK, pair]
    assert frame_sentences([[FULL_IMAGE], evidence], ("box", "box"))[-1] == "Here are the 2 boxes."
    assert frame_sentences([[FULL_IMAGE]], ("sky",)) == ["Here is the sky."]
    with pytest.raises(ValueError, match=r"names \(1\).*\(2\)"):
        frame_sentences(frames, ("red ball",))


def test_evidence_without_names_is_a_relevant_part():
    two = with_depth(Draft(replace(BLANK, boxes=((0.1, 0.1, 0.3, 0.3), (0.6, 0.6, 0.9, 0.9)))))
    [unnamed, named] = TemplateTraces(CONFIG)([two, replace(two, names=("red ball", "cone"))])
    assert f"Here are the 2 {ANY_NAME}s." in unnamed.sample.trace
    assert "Here is the red ball and the cone." in named.sample.trace


@pytest.mark.parametrize(
    ("change", "names", "reasons"),
    [
        ({"boxes": ((0.5, 0.5, 0.501, 0.501),)}, (), ("boxes_invalid",)),
        ({"boxes": ((0.5, 0.5, 1.5, 0.9),)}, (), ("boxes_invalid",)),
        ({"boxes": ((0.5, 0.5, 0.4, 0.6),)}, (), ("boxes_invalid",)),
        ({"boxes": ()}, (), ("boxes_invalid",)),
        ({"answer": " "}, (), ("answer_empty",)),
        ({"question": "", "answer": "\n"}, (), ("question_empty", "answer_empty")),
        ({"answer": "2</answer>"}, (), ("trace_stray_tag",)),
        ({}, ("red ball", "cone"), ("names_not_per_box",)),
        ({}, ("a <text> tag",), ("trace_tag_order", "trace_stray_tag")),
    ],
)
def test_a_bad_draft_is_refused_with_reasons(change, names, reasons):
    draft = with_depth(Draft(replace(BLANK, **change), names))
    [refused] = TemplateTraces(CONFIG)([draft])
    assert set(refused.reasons) & set(reasons) and refused.reasons[0] == reasons[0]
    assert refused.sample.sample_id == BLANK.sample_id


def test_a_refused_draft_is_left_as_it_is():
    refused = Draft(replace(BLANK, boxes=()), reasons=("image_unreadable",))
    assert TemplateTraces(CONFIG)([refused]) == [refused]


# --- checks ----------------------------------------------------------------------------------------------------------

MOVED = (0.0, 0.0, 0.3, 0.3)
PLANTED = {
    "boxes_invalid": lambda sample: {"boxes": ((0.5, 0.2, 0.4, 0.6),) * len(sample.boxes)},
    "trace_tag_order": lambda sample: {"trace": sample.trace.replace("<text>", "", 1)},
    "trace_bbox_out_of_range": lambda sample: {"trace": sample.trace.replace("1.00,1.00]", "1.00,1.10]", 1)},
    "first_frame_not_whole_image": lambda sample: {"trace": sample.trace.replace("1.00,1.00]", "1.00,0.99]", 1)},
    "boxes_not_schedule": lambda sample: {"frames": (*sample.frames[:-1], (MOVED,) * len(sample.boxes))},
    "last_boxes_not_evidence": lambda sample: {"boxes": (MOVED,) * len(sample.boxes)},
    "answer_not_truth": lambda sample: {"answer": sample.answer + " perhaps"},
}


@pytest.mark.parametrize("fault", PLANTED)
def test_every_planted_fault_is_found_and_can_be_explained(fault, sample):
    depth_rel = stored_ramp()
    assert faults(sample, depth_rel, 2) == []
    planted = replace(sample, **PLANTED[fault](sample))
    assert fault in faults(planted, depth_rel, 2)
    assert (fault in form_faults(planted, depth_rel, 2)) == (fault != "answer_not_truth")
    assert EXPLANATIONS[fault]


def test_a_depth_that_is_not_the_mean_of_its_box_is_found(sample):
    depth_rel = stored_ramp()
    assert faults(sample, depth_rel * 0.5, 2) == ["depth_not_box_mean"]
    assert box_mean(RAMP, FULL_IMAGE) == pytest.approx(0.5, abs=0.01)
    nudged = sample.trace.replace('1.00,1.00],"depth":0.50', '1.00,1.00],"depth":0.52', 1)
    assert nudged != sample.trace
    assert faults(replace(sample, trace=nudged), depth_rel, 2) == ["depth_not_box_mean"]


def test_an_answer_is_the_truth_in_other_words_of_the_same_meaning(sample):
    counted = replace(sample, answer="3", trace=sample.trace.replace(f">{sample.answer}<", ">Three.<"))
    assert faults(counted, stored_ramp(), 2) == []
