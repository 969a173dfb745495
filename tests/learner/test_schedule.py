"""Learning rates at the ends and in the middle of a run."""

from __future__ import annotations

import pytest

from sif_ray.learner.schedule import learning_rate


def rates(schedule: str, warmup_share: float = 0.0, total: int = 10) -> list[float]:
    return [
        learning_rate(step, total, peak=2.0, schedule=schedule, warmup_share=warmup_share) for step in range(total + 1)
    ]


def test_linear_starts_at_the_peak_and_ends_at_zero():
    assert rates("linear") == pytest.approx([2.0, 1.8, 1.6, 1.4, 1.2, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0])


def test_cosine_is_half_way_down_in_the_middle():
    found = rates("cosine")
    assert (found[0], found[5], found[10]) == pytest.approx((2.0, 1.0, 0.0))


def test_warmup_rises_from_above_zero_to_the_peak():
    found = rates("linear", warmup_share=0.4)
    assert found[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert found[10] == 0.0


def test_constant_stays_and_no_schedule_goes_below_zero():
    assert rates("constant") == [2.0] * 11
    assert learning_rate(99, 10, peak=2.0, schedule="cosine", warmup_share=0.0) == pytest.approx(0.0)


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="'step'"):
        learning_rate(0, 10, peak=1.0, schedule="step", warmup_share=0.0)
