"""Rates of a machine from what a run on it has measured: the spans of its timeline and its metrics.

Everything comes from the stages themselves, nothing from the time between two steps, which is what is to be predicted:

- A group that an engine wrote in D seconds, its longest answer L tokens, beside n sequences in the mean, says
  D = request_s + L (a + b n) s, where s is the slowdown in so far as the learner trained meanwhile. Least squares over
  all groups gives request_s, a, b (none negative) and s; a + b n is the decode step.
- A training step's seconds are step_s + token_s times its tokens, prompts counted once.
- Scoring, sync and the engines' pauses are medians.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from sif_ray import config as configuration
from sif_ray.config import ConfigError
from sif_ray.observe.metrics import read_metrics
from sif_ray.observe.timeline import Span, merge_intervals, read_timeline
from sif_ray.plan.scenario import LearnerRates, Lengths, Rates

MIN_STEPS = 4
SLOWDOWNS = tuple(1 + 0.05 * index for index in range(41))  # tried: 1 to 3
SEQUENCES = 1024  # longest table of decode steps


@dataclass(frozen=True)
class Measurements:
    """What `scenario_of` needs of a run, and the median step that it had."""

    rates: Rates
    lengths: Lengths
    prompt_tokens: int  # mean
    groups: int
    steps: int
    step_s: float


def read_measurements(folder: Path, first: int = 2, last: int = 0) -> Measurements:
    """From the steps `first` to `last` (0 = to the end) of a GRPO run's folder; the very first step warms up.

    Raises `ConfigError` for a folder without them.
    """
    metrics, timeline = folder / "metrics.jsonl", folder / "timeline.jsonl"
    if not all(file.is_file() for file in (metrics, timeline, folder / "config.yaml")):
        raise ConfigError(
            f"--from-run {folder}: is not the folder of a GRPO run, with metrics.jsonl and timeline.jsonl"
        )
    prompts = configuration.load("grpo", str(folder / "config.yaml")).groups_per_step
    steps = [line for line in read_metrics(metrics) if line["step"] >= first - 1 and (not last or line["step"] <= last)]
    if len(steps) < MIN_STEPS + 1:
        raise ConfigError(f"--from-run {folder}: {len(steps)} steps are too few; {MIN_STEPS + 1} are needed")
    begin_s, end_s = steps[0]["time_s"], steps[-1]["time_s"]
    spans = read_timeline(timeline)
    within = [span for span in spans if begin_s <= span.start_s and span.end_s <= end_s]
    groups = [span for span in spans if span.kind == "generate" and span.end_s > begin_s and span.start_s < end_s]
    if not groups or any("tokens" not in span.labels for span in groups):
        raise ConfigError(f"--from-run {folder}: its timeline does not say how long completions were; run it anew")
    prompt_tokens = round(statistics.mean(span.labels["prompt_tokens"] for span in groups))
    trains = [span for span in spans if span.kind == "train"]
    request_s, base_s, sequence_s, slowdown = _decoding(
        [span for span in within if span.kind == "generate"], groups, trains
    )
    longest = max(max(span.labels["tokens"]) for span in groups)
    syncs = [span.end_s - span.start_s for span in within if span.kind == "sync"]
    pauses = [step["sync_pause_s"] for step in steps[1:] if "sync_pause_s" in step]
    pause_s = statistics.median(pauses) if pauses else 0.0
    rates = Rates(
        decode_step_s=tuple(base_s + sequence_s * count for count in range(SEQUENCES + 1)),
        learner=_learning([span for span in within if span.kind == "train"], steps[1:], prompts * prompt_tokens),
        request_s=request_s,
        score_s=statistics.median(span.end_s - span.start_s for span in within if span.kind == "score"),
        transfer_s=max(0.0, statistics.median(syncs) - pause_s),
        pause_s=pause_s,
        decode_slowdown=slowdown,
    )
    lengths = tuple(tuple(span.labels["tokens"]) for span in groups)
    step_seconds = [after["time_s"] - before["time_s"] for before, after in pairwise(steps)]
    return Measurements(
        rates,
        Lengths(mean=float(np.mean([np.mean(group) for group in lengths])), max_tokens=longest, measured=lengths),
        prompt_tokens,
        groups=len(groups),
        steps=len(steps) - 1,
        step_s=statistics.median(step_seconds),
    )


def _decoding(
    groups: Sequence[Span], all_groups: Sequence[Span], trains: Sequence[Span]
) -> tuple[float, float, float, float]:
    """(request_s, seconds of a step without sequences, seconds more for each, slowdown while the learner trains)."""
    seconds = np.array([span.end_s - span.start_s for span in groups])
    longest = np.array([max(span.labels["tokens"]) for span in groups], dtype=float)
    beside = np.array([_sequences_beside(span, all_groups) for span in groups])
    training = np.array(
        [_covered(span, merge_intervals((one.start_s, one.end_s) for one in trains)) for span in groups]
    )
    best: tuple[float, list[float]] = (np.inf, [])
    for slowdown in SLOWDOWNS:
        # In time, a share t of training does t / slowdown of the work that it would do alone.
        effective = longest / (1 - training + training / slowdown)
        found, residual = nnls(np.stack([np.ones_like(longest), effective, effective * beside], axis=1), seconds)
        if residual < best[0] * 0.999:
            best = (residual, [*found, slowdown])
    request_s, base_s, sequence_s, slowdown = (float(value) for value in best[1])
    return request_s, base_s, sequence_s, slowdown


def _sequences_beside(span: Span, groups: Sequence[Span]) -> float:
    """Sequences that the engine wrote in the mean during a span, its own included: of a group as many as its tokens
    make of its longest answer."""
    total = 0.0
    for other in groups:
        overlap_s = min(span.end_s, other.end_s) - max(span.start_s, other.start_s)
        if other.lane == span.lane and overlap_s > 0:
            tokens = other.labels["tokens"]
            total += overlap_s * sum(tokens) / max(tokens)
    return total / (span.end_s - span.start_s)


def _covered(span: Span, intervals: Sequence[tuple[float, float]]) -> float:
    """Share of a span inside disjoint, ascending intervals."""
    first = max(0, bisect_left(intervals, (span.start_s, span.start_s)) - 1)
    covered_s = 0.0
    for start_s, end_s in intervals[first:]:
        if start_s >= span.end_s:
            break
        covered_s += max(0.0, min(end_s, span.end_s) - max(start_s, span.start_s))
    return covered_s / (span.end_s - span.start_s)


def _learning(trains: Sequence[Span], steps: Sequence[dict[str, float]], of_prompts: int) -> LearnerRates:
    """The line through the training steps' seconds over their tokens, `of_prompts` of every step included."""
    trained = {int(step["step"]) - 1: step["trained_tokens"] + of_prompts for step in steps}
    pairs = [
        (trained[span.labels["step"]], span.end_s - span.start_s) for span in trains if span.labels["step"] in trained
    ]
    tokens, seconds = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    (step_s, token_s), _ = nnls(np.stack([np.ones_like(tokens), tokens], axis=1), seconds)
    return LearnerRates(step_s=float(step_s), token_s=float(token_s))
