"""What a training step says about its rollouts, its weight transfer and its judges, as scalars for the log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sif_ray.judge.scoring import ABLATION_TERMS, TERMS
from sif_ray.records import FloatArray, ScoredGroup
from sif_ray.rollout.weights import Receipt


def receipt_metrics(receipts: Sequence[Receipt]) -> dict[str, float]:
    """How long engines stood still for an update, and what their caches saved since the one before."""
    prompts = sum(receipt.prompt_tokens for receipt in receipts)
    pause = {"sync_pause_s": max(receipt.pause_s for receipt in receipts)} if receipts else {}
    saved = prompts - sum(receipt.computed_prompt_tokens for receipt in receipts)
    return pause | ({"prompt_cache_share": saved / prompts} if prompts else {})


def batch_metrics(groups: Sequence[ScoredGroup], seconds: float) -> dict[str, float]:
    """What a batch says about rollouts and rewards; rates are per second of `seconds`, the step's share of the run."""
    rollouts = [rollout for scored in groups for rollout in scored.group.rollouts]
    lengths = [len(rollout.token_ids_T) for rollout in rollouts]

    def mean_of(term: str) -> float:
        return float(np.mean(np.concatenate([scored.terms_G[term] for scored in groups])))

    return {
        "reward/total": float(np.mean(np.concatenate([scored.rewards_G for scored in groups]))),
        **{f"reward/{term}": mean_of(term) for term in (*TERMS, *ABLATION_TERMS)},
        "answer_score": mean_of("answer_score"),
        "iou_last": mean_of("iou_last"),
        "no_spread_share": float(np.mean([not has_spread(scored.rewards_G) for scored in groups])),
        "completions_per_s": len(rollouts) / seconds,
        "generated_tokens_per_s": sum(lengths) / seconds,
        "completion_tokens_mean": float(np.mean(lengths)),
        "truncated_share": float(np.mean([rollout.finish_reason == "length" for rollout in rollouts])),
    }


def has_spread(rewards_G: FloatArray) -> bool:
    """Whether the rewards of a group differ; if not, every advantage is 0 (DAPO, arXiv 2503.14476)."""
    return bool(np.ptp(rewards_G) > 0)


def judge_totals(metrics: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The totals of several judges together: counts and costs add up, of latencies ("..._s") the longest is kept."""
    totals: dict[str, float] = {}
    for of_judge in metrics:
        for name, value in of_judge.items():
            known = totals.get(name, 0.0)
            totals[name] = max(known, value) if name.endswith("_s") else known + value
    return totals
