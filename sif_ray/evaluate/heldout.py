"""Held-out samples with their controls: from answers to items, and from items to the numbers of results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from sif_ray.config import EvaluateConfig
from sif_ray.evaluate.arms import arms
from sif_ray.evaluate.metrics import TERMS, chances, majority_shares, score_text
from sif_ray.evaluate.question import Answer, Key
from sif_ray.evaluate.results import Item, summarise
from sif_ray.judge.exact import ExactMatchJudge
from sif_ray.judge.scoring import read_depth_image
from sif_ray.records import Sample
from sif_ray.toyworld.questions import CHANCE

TABLE_WIDTH = 110  # characters, also where the output is a file


def items(samples: Sequence[Sample], found: Mapping[str, Mapping[Key, Answer]], config: EvaluateConfig) -> list[Item]:
    """The scored answers {policy: {key: answer}} in the order of policies, samples, arms and draws."""
    judge = ExactMatchJudge()
    depths = ((sample, read_depth_image(sample.depth_image, config.profile)) for sample in samples)
    by_sample = [
        {
            "checkpoint": policy,
            "arm": arm.name,
            "sample_id": sample.sample_id,
            "scene_id": sample.scene_id,
            "question_type": sample.question_type,
            "draw": draw,
            "text": (text := answers[Key(config.split, arm.name, draw, sample.sample_id)].text),
            **score_text(sample, depth_rel, text, config.profile, config.rewards, judge),
        }
        for sample, depth_rel in depths  # each decoded once
        for policy, answers in found.items()
        for arm in arms(config)
        for draw in range(arm.draws)
    ]
    policies = list(found)
    return sorted(by_sample, key=lambda item: policies.index(item["checkpoint"]))


def results(
    samples: Sequence[Sample], scored: Sequence[Item], policies: Sequence[str], config: EvaluateConfig
) -> dict[str, Any]:
    """The numbers of a held-out split (`summarise`)."""
    designed = CHANCE if {sample.dataset for sample in samples} == {"toyworld"} else {}
    return summarise(
        scored, policies, chances(samples, designed), majority_shares(samples), config.bootstrap_samples, config.seed
    )


def table(results: Mapping[str, Any]) -> Table:
    """A short table for people: means by checkpoint and arm, then the paired differences; ± half an interval."""
    title = f"{results['num_items']} items of {results['num_scenes']} scenes, 95 % scene-level intervals"
    shown = Table(title=title, box=SIMPLE_HEAD)
    for column in ("", *TERMS):
        shown.add_column(column, no_wrap=True)
    for name, checkpoint in results["checkpoints"].items():
        shown.add_row(f"[bold]{name}")
        for arm, found in checkpoint["arms"].items():
            means = (found["means"][term] for term in TERMS)
            shown.add_row(f"  {arm}", *(_cell(f"{mean['mean']:.2f}", mean["ci95"]) for mean in means))
    if results["paired"]:
        comparison = results["comparison"]
        shown.add_row(f"[bold]{comparison['checkpoint']} - {comparison['baseline']}")
        for arm, found in results["paired"].items():
            differences = (found[term] for term in TERMS)
            shown.add_row(f"  {arm}", *(_cell(f"{pair['difference']:+.2f}", pair["ci95"]) for pair in differences))
    return shown


def _cell(value: str, ci95: Sequence[float]) -> str:
    return f"{value} ±{(ci95[1] - ci95[0]) / 2:.2f}"
