"""The suite `sync` on a load so small that its figures mean nothing."""

from __future__ import annotations

import pytest

from sif_ray.bench.sync import Load, measure, shape

TINY = shape(64, 1)
SMALL = Load(shapes=(TINY,), groups=2, group_size=2, max_tokens=8, max_num_seqs=4)


@pytest.mark.slow
def test_every_receipt_is_for_the_bytes_of_the_policy(ray_local):
    found = measure(1, SMALL)
    [size] = found.figures["sizes"]
    assert size["bytes"] == 4 * TINY.num_parameters
    assert size["sync_s"]["median"] >= size["publish_s"]["median"] + size["pause_s"]["median"]
    assert found.figures["step"]["step_s"]["median"] > 0
    assert [goal.name.split(",")[0] for goal in found.goals] == [f"sync of {size['mb']:.0f} MB", "pause"]
