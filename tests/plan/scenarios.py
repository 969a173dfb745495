"""Small scenarios whose outcome can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sif_ray.plan.scenario import LearnerRates, Lengths, Rates, Scenario

PLAIN = Scenario(
    num_steps=12,
    groups_per_step=4,
    group_size=2,
    max_staleness=0,
    num_engines=1,
    gpus_per_engine=1,
    max_num_seqs=8,
    learner_ranks=1,
    lengths=Lengths(mean=100.0, max_tokens=200, cv=0.0),
    prompt_tokens=50,
    rates=Rates(decode_step_s=(0.01,) * 9, learner=LearnerRates(step_s=0.5, token_s=0.001)),
    checkpoint_every=0,
)
"""All 8 completions of a step at once: 100 tokens x 10 ms = 1 s; 4 x (50 + 200) tokens x 1 ms + 0.5 s = 1.5 s of
training."""


def changed(rates: dict[str, Any] | None = None, **changes: Any) -> Scenario:
    """`PLAIN` with other values, of its rates too."""
    return replace(PLAIN, rates=replace(PLAIN.rates, **(rates or {})), **changes)
