"""Busy shares against counting small ticks of time."""

from __future__ import annotations

import random

import pytest

from sif_ray.observe.charts import bin_shares, lane_chart
from sif_ray.observe.summary import engine_learner_overlap
from sif_ray.observe.timeline import Span, Timeline, busy_share, merge_intervals, read_timeline

TICKS = 400  # spans begin and end on whole ticks, so counting covered ticks is exact


def random_spans(seed: int) -> list[Span]:
    rng = random.Random(seed)
    kinds = {"engine 0": ["generate"], "learner 0": ["train", "wait"], "reward 0": ["score"]}
    spans = []
    for lane, choices in kinds.items():
        for _ in range(rng.randrange(1, 25)):
            start = rng.randrange(TICKS)
            spans.append(Span(lane, rng.choice(choices), start, min(TICKS, start + rng.randrange(0, 60))))
    return spans


def covered(spans: list[Span], lane: str, kinds: set[str]) -> set[int]:
    chosen = [span for span in spans if span.lane == lane and span.kind in kinds]
    return {tick for span in chosen for tick in range(int(span.start_s), int(span.end_s))}


def extent(spans: list[Span]) -> float:
    return max(span.end_s for span in spans) - min(span.start_s for span in spans)


@pytest.mark.parametrize("seed", range(20))
def test_busy_share_counts_overlaps_once(seed):
    spans = random_spans(seed)
    for lane, kinds in (("engine 0", {"generate"}), ("learner 0", {"train"}), ("learner 0", {"train", "wait"})):
        assert busy_share(spans, lane, kinds) == pytest.approx(len(covered(spans, lane, kinds)) / extent(spans))


@pytest.mark.parametrize("seed", range(20))
def test_overlap_of_engine_and_learner(seed):
    spans = random_spans(seed)
    both = covered(spans, "engine 0", {"generate"}) & covered(spans, "learner 0", {"train"})
    assert engine_learner_overlap(spans) == pytest.approx(len(both) / extent(spans))


@pytest.mark.parametrize("seed", range(5))
def test_shares_by_bin(seed):
    spans = random_spans(seed)
    ticks = covered(spans, "engine 0", {"generate"})
    merged = merge_intervals((span.start_s, span.end_s) for span in spans if span.lane == "engine 0")
    shares = bin_shares(merged, TICKS, 8)
    width = TICKS // 8
    assert shares == pytest.approx([len(ticks & set(range(k * width, (k + 1) * width))) / width for k in range(8)])


def test_no_spans_or_no_extent_is_not_busy():
    assert busy_share([], "engine 0", {"generate"}) == 0.0
    assert busy_share([Span("engine 0", "generate", 5.0, 5.0)], "engine 0", {"generate"}) == 0.0


def test_spans_are_written_and_read(tmp_path):
    timeline = Timeline(tmp_path / "timeline.jsonl")
    timeline.span("engine 0", "generate", 10.0, 12.0, step=3)
    timeline.span("learner 0", "train", 11.0, 14.0, step=2)
    assert timeline.busy_share("engine 0", {"generate"}) == pytest.approx(0.5)
    timeline.close()
    first, _ = read_timeline(tmp_path / "timeline.jsonl")
    assert first == Span("engine 0", "generate", 10.0, 12.0, {"step": 3})


@pytest.mark.parametrize(("kind", "end_s", "told"), [("sleep", 2.0, "sleep"), ("train", 0.5, "before it starts")])
def test_impossible_spans_are_refused(tmp_path, kind, end_s, told):
    with pytest.raises(ValueError, match=told):
        Timeline(tmp_path / "timeline.jsonl").span("learner 0", kind, 1.0, end_s)


def test_the_chart_has_every_lane_in_order_of_the_loop():
    spans = [Span(lane, "wait", 0.0, 1.0) for lane in ("sync", "learner 0", "engine 1", "engine 0", "reward 0")]
    names = [lane.name for lane in lane_chart(spans).lanes]
    assert names == ["engine 0", "engine 1", "reward 0", "learner 0", "sync"]
