"""Group-relative advantages."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

STD_EPSILON = 1e-4  # of the released code; keeps a group of equal rewards at advantage zero


def group_advantages(rewards_G: npt.ArrayLike, *, normalise: str = "std") -> npt.NDArray[np.float32]:
    """How much better each of the G rollouts of one prompt is than their mean, (G,).

    normalise="std":  A_i = (R_i - mean(R)) / (std(R) + 1e-4), std with G - 1 in the denominator (GRPO as released
                      with SIFThinker, arXiv 2508.06259; DeepSeekMath, arXiv 2402.03300, eq. 3 with outcome rewards).
    normalise="mean": A_i = R_i - mean(R) (Dr. GRPO, arXiv 2503.20783: no weight for easy or hard prompts).

    Raises ValueError for fewer than two rewards, a reward that is not finite or an unknown `normalise`.
    """
    rewards = np.asarray(rewards_G, dtype=np.float64)
    if rewards.ndim != 1 or len(rewards) < 2:
        raise ValueError(
            f"rewards_G has shape {rewards.shape}: an advantage compares at least two rollouts of one prompt"
        )
    if not np.isfinite(rewards).all():
        raise ValueError(f"rewards_G = {rewards.tolist()}: every reward must be finite; drop the group instead")
    centred = rewards - rewards.mean()
    if normalise == "std":
        centred = centred / (rewards.std(ddof=1) + STD_EPSILON)
    elif normalise != "mean":
        raise ValueError(f"normalise = {normalise!r}: must be 'std' or 'mean'")
    return centred.astype(np.float32)
