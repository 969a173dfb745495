"""The suite `rollout` on a load so small that its rates mean nothing."""

from __future__ import annotations

import pytest

from sif_ray.bench.rollout import Load, measure

SMALL = Load(groups=6, group_size=4, max_tokens=16, max_num_seqs=16)


@pytest.mark.timeout(600)  # starts three engines, one after the other
def test_all_ways_write_the_same_tokens_and_a_group_shares_its_prompt(ray_local):
    findings = measure(1, SMALL)
    figures = findings.figures
    assert 0 < figures["tokens"] <= 6 * 4 * 16
    assert all(figures["tokens_per_s"][way]["median"] > 0 for way in ("actors", "llm", "llm_own_executor"))
    share, blocks, images = findings.goals
    assert share.value == pytest.approx(
        figures["tokens_per_s"]["actors"]["median"] / figures["tokens_per_s"]["llm"]["median"]
    )
    assert blocks.value == 1.0
    assert images.value == 1.0
    assert 1.0 < figures["times_per_group"]["prompt"] < SMALL.group_size
