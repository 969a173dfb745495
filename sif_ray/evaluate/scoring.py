"""From the items of a benchmark and saved outputs to its scores, in both conventions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sif_ray.evaluate.benchmarks.item import Benchmark, Reply
from sif_ray.evaluate.measure import CONVENTIONS, OVERALL, sample_all
from sif_ray.evaluate.predictions import Matched
from sif_ray.judge.outcome import Judge, JudgeUnavailable, Scored, Unavailable
from sif_ray.method.trace import find_answer

IDS_SHOWN = 20  # of those without a prediction, or without an item


async def judged(replies: Sequence[Reply], make_judge: Callable[[], Judge]) -> list[Reply]:
    """The replies with a judge's verdicts, who sees text alone; a reply without an answer block has 0 unasked.

    The judge is made here, as it belongs to one event loop. Raises `JudgeUnavailable` where it answers nobody: scores
    of the rest would be those of another benchmark.
    """
    judge = make_judge()

    async def verdict(reply: Reply) -> Reply:
        answer = find_answer(reply.text)
        if answer is None:
            return replace(reply, verdict=0.0)
        outcome = await judge.judge(reply.item.question, reply.item.answer, answer, b"")
        if isinstance(outcome, Unavailable):
            raise JudgeUnavailable(f"{outcome.advice}; run this again once it answers, its verdicts so far are kept")
        return replace(reply, verdict=outcome.score if isinstance(outcome, Scored) else None)

    try:
        return list(await asyncio.gather(*map(verdict, replies)))
    finally:
        await judge.close()


def score(benchmark: Benchmark, matched: Matched, *, num_samples: int, seed: int) -> dict[str, Any]:
    """The result of a benchmark, as JSON. Its replies have their verdicts where the benchmark is judged.

    Each convention has its headline ("score", "ci95") and its "tables", {measure: {group: {"score", "ci95", "n"}}}.
    Intervals are percentiles of `num_samples` resamples of whole images.
    """
    replies = matched.replies
    measures = benchmark.measure(replies)
    unreadable = sum(not benchmark.readable(reply) for reply in replies)
    unjudged = sum(reply.verdict is None for reply in replies) if benchmark.judged else 0
    result: dict[str, Any] = {
        "benchmark": benchmark.name,
        "summary": benchmark.summary,
        "metric": measures[0].name,
        "n": len(replies),
        "missing": _ids(matched.missing),
        "surplus": _ids(matched.surplus),
        "parse_failures": {"n": unreadable, "rate": unreadable / len(replies)},
        "unjudged": unjudged,
        "conventions": benchmark.conventions,
        "bootstrap": {"samples": num_samples, "seed": seed, "drawn": "images"},
    }
    sampled = {measure.name: sample_all(measure, num_samples, seed) for measure in measures}
    for convention in CONVENTIONS:
        tables = {
            name: {group: found.summary() for group, found in of_measure[convention].items()}
            for name, of_measure in sampled.items()
        }
        result[convention] = {**tables[measures[0].name][OVERALL], "tables": tables}
    return result


def _ids(names: Sequence[str]) -> dict[str, Any]:
    return {"n": len(names), "first": list(names[:IDS_SHOWN])}
