"""The suite `rollout` on a load so small that its rates mean nothing."""

from __future__ import annotations

import pytest

from sif_ray.bench.rollout import Load, measure

SMALL = Load(groups=6, group_size=4, max_tokens=16, max_num_seqs=16)
WAYS = ("actors", "llm", "llm_own_executor")


@pytest.mark.slow  # starts three engines, one after the other
@pytest.mark.timeout(600)
def test_all_ways_write_the_same_tokens_and_a_group_shares_its_prompt(ray_local):
    findings = measure(1, SMALL)  # raises where the tokens differ
    figures = findings.figures
    [tokens] = figures["tokens"]
    assert 0 < tokens <= SMALL.groups * SMALL.group_size * SMALL.max_tokens
    medians = {way: rates["median"] for way, rates in figures["tokens_per_s"].items()}
    assert set(medians) == set(WAYS) and min(medians.values()) > 0
    share, blocks, images = findings.goals
    assert share.value == pytest.approx(medians["actors"] / medians["llm"])
    assert blocks.value == 1.0
    assert images.value == 1.0
    assert 1.0 < figures["times_per_group"]["prompt"] < SMALL.group_size
