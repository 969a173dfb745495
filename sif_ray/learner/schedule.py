"""Learning-rate schedules."""

from __future__ import annotations

import math


def learning_rate(step: int, total_steps: int, *, peak: float, schedule: str, warmup_share: float) -> float:
    """Rate of optimiser step `step` (0-based) of `total_steps`.

    It rises linearly over the first `warmup_share` of the steps, reaches `peak` and then decays to zero after the last
    step ("linear", "cosine") or stays ("constant"). Raises ValueError for an unknown schedule.
    """
    warmup_steps = int(warmup_share * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - progress)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    raise ValueError(f"lr_schedule = {schedule!r}: must be 'linear', 'cosine' or 'constant'")
