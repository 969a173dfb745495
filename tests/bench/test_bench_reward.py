"""The suite `reward` on a load so small that its figures mean nothing."""

from __future__ import annotations

from sif_ray.bench.reward import Load, make_groups, measure
from sif_ray.method.trace import TraceError, find_areas, parse

SMALL = Load(traces=48, group_size=4, width=64, height=48, open_tickets=(20, 60), rounds=1)


def is_trace(text: str) -> bool:
    try:
        parse(text)
    except TraceError:
        return False
    return True


def test_texts_are_mostly_traces_of_several_steps():
    texts = [text for group in make_groups(SMALL) for text in group.texts_G]
    assert len(texts) == 48
    assert 24 < sum(map(is_trace, texts)) < 48
    assert max(len(find_areas(text)) for text in texts) > 4
    assert make_groups(SMALL) == make_groups(SMALL)


def test_both_ways_score_every_trace_and_the_ledger_keeps_its_tickets():
    found = measure(1, SMALL)
    assert found.figures["traces"]["traces"] == 48
    assert 0 < found.figures["traces"]["mean_reward"] < 6
    assert {name: len(rates["values"]) for name, rates in found.figures["traces"]["traces_per_s"].items()} == {
        "terms": 1,
        "worker": 1,
    }
    assert found.figures["ledger"]["transitions_per_s"].keys() == {"20", "60"}
    assert len(found.goals) == 3
