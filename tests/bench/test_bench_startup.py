"""The suite `startup`: what it reads off a timeline, and one start of the real job."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from sif_ray.bench.startup import Load, measure, overlap, seconds_of, share_at_work
from sif_ray.bench.startup_figure import startup_svg
from sif_ray.observe.timeline import Span

SPANS = [
    Span("driver", "start", 0.0, 4.0, {"what": "process"}),
    Span("engine 0", "start", 5.0, 15.0),
    Span("learner 0", "start", 9.0, 14.0),
    Span("engine 0", "generate", 15.0, 16.0),
    Span("learner 0", "wait", 15.0, 18.0),
    Span("reward 0", "score", 16.0, 16.5),
    Span("learner 0", "train", 18.0, 20.0),
]


def test_parts_overlap_and_work_are_read_off_the_timeline():
    assert seconds_of(SPANS) == {
        "driver: process": 4.0,
        "engine 0: start": 10.0,
        "learner 0: start": 5.0,
        "first generate": 1.0,
        "first score": 0.5,
        "first train": 2.0,
        "from the last start": 5.0,
        "total": 20.0,
    }
    assert overlap(SPANS, "engine 0", "learner 0") == overlap(SPANS, "learner 0", "engine 0") == 1.0
    assert overlap(SPANS, "driver", "learner 0") == 0.0
    assert share_at_work(SPANS) == pytest.approx((4.0 + 11.5 + 2.0) / 20.0)


def test_the_figure_has_a_bar_for_all_but_waiting():
    drawn = ElementTree.fromstring(startup_svg(SPANS))
    _, *bars = drawn.iter("{http://www.w3.org/2000/svg}rect")
    words = {text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")}
    assert len(bars) == sum(span.kind != "wait" for span in SPANS)
    assert {"driver", "engine 0", "learner 0", "reward 0", "process", "start", "generate", "score", "train"} <= words
    scale = (float(bars[1].get("width"))) / 10.0  # px per second, by the engine's start
    for bar, span in zip(bars, [span for span in SPANS if span.kind != "wait"], strict=True):
        assert float(bar.get("width")) == pytest.approx((span.end_s - span.start_s) * scale, abs=0.1)
        assert float(bar.get("x")) - float(bars[0].get("x")) == pytest.approx(span.start_s * scale, abs=0.2)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_start_of_the_real_job_is_told_part_by_part():
    findings = measure(1, Load(groups_per_step=2, group_size=2, max_tokens=8))
    seconds = {part: values["median"] for part, values in findings.figures["seconds"].items()}
    driver = [f"driver: {what}" for what in ("process", "checks", "Ray", "room")]
    starts = [*driver, "engine 0: start", "learner 0: start", "reward 0: start"]
    assert {*starts, "first generate", "first score", "first train", "total"} <= seconds.keys()
    assert sum(seconds[part] for part in driver) < seconds["engine 0: start"] + seconds["total"]
    assert all(0 <= second <= seconds["total"] for second in seconds.values())
    assert all(0 < goal.value <= 1 for goal in findings.goals)
    assert findings.figures["timeline"][-1]["kind"] == "train"
