"""A plan in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

from sif_ray.observe.charts import short
from sif_ray.plan.figures import Figures
from sif_ray.plan.scenario import Scenario
from sif_ray.plan.search import Request
from sif_ray.resources.memory import GIB, engine_memory, learner_memory
from sif_ray.resources.plan import learner_lines

SHOWN = 8  # candidates of a search
COLUMNS = ("GPUs", "learner", "engines", "stale", "step s", "p95 s", "compl./s", "tokens/s", "learner", "engines")


def memory_lines(request: Request, source: str, best: Figures) -> Iterator[str]:
    """What one GPU of each kind holds."""
    config = request.config
    learner = replace(config.learner, num_ranks=best.learner_ranks)
    held = learner_memory(request.shape, learner, holds_reference=config.objective.kl_beta > 0)
    yield from learner_lines(request.shape, source, learner, held)
    engine = engine_memory(request.shape, config.engine, request.gpu.memory_gib * GIB)
    yield (
        f"  engine, per GPU: {engine.total / GIB:.1f} GiB ({engine.weights / GIB:.1f} weights, "
        f"{engine.kv_cache / GIB:.1f} KV cache)"
    )


def assumption_lines(request: Request) -> Iterator[str]:
    """Every assumption with its value."""
    yield "Assumed (--assume name=value):"
    values = [f"{item.name} {getattr(request.assumed, item.name):g}" for item in fields(request.assumed)]
    for first in range(0, len(values), 5):
        yield "  " + ", ".join(values[first : first + 5])
    lengths = request.workload.lengths
    yield (
        f"  prompts of {request.workload.prompt_tokens} tokens ({request.workload.image_tokens} of images), answers of "
        f"{lengths.mean:g} (deviation {lengths.cv:g} of it, at most {lengths.max_tokens}), judge "
        f"{request.judge_latency_s:g} s"
    )


def rate_lines(scenario: Scenario) -> Iterator[str]:
    """What the simulation was told about time."""
    rates, learner = scenario.rates, scenario.rates.learner
    last = min(scenario.max_num_seqs, len(rates.decode_step_s) - 1)
    yield (
        f"Rates: decode step {1000 * rates.decode_step_s[1]:.3g} ms for 1 sequence, "
        f"{1000 * rates.decode_step_s[last]:.3g} ms for {last}; prompt {1000 * rates.prefill_s:.3g} ms"
    )
    gathers = f", {learner.gather_s:.3g} s gathered per micro-batch" if learner.gather_s else ""
    yield (
        f"  learner rank {1e6 * learner.token_s:.3g} us a token, {1000 * learner.group_s:.3g} ms a group's images, "
        f"{learner.step_s:.3g} s a step{gathers}"
    )
    yield (
        f"  sync: publish {rates.publish_s:.3g} s, transfer {rates.transfer_s:.3g} s"
        f"{' for each engine in turn' if rates.transfer_in_turn else ''}, pause {rates.pause_s:.3g} s"
    )


def table(figures: Sequence[Figures]) -> Iterator[str]:
    """One line for each, the first marked."""
    yield "  " + " ".join(f"{name:>9}" for name in COLUMNS) + "  limit"
    for place, one in enumerate(figures):
        cells = (
            one.gpus,
            one.learner_ranks,
            one.num_engines,
            one.max_staleness,
            f"{one.step_s:.1f}",
            f"{one.step_p95_s:.1f}",
            short(one.completions_per_s),
            short(one.tokens_per_s),
            f"{one.learner_busy:.0%}",
            f"{one.engines_busy:.0%}",
        )
        yield ("* " if place == 0 else "  ") + " ".join(f"{cell:>9}" for cell in cells) + f"  {one.bottleneck}"


def summary(one: Figures) -> Iterator[str]:
    """All figures of one run."""
    yield (
        f"Step: median {one.step_s:.2f} s, 95 % {one.step_p95_s:.2f} s; {one.steps_per_h:.0f} steps/h, "
        f"{short(one.completions_per_s)} completions/s, {short(one.tokens_per_s)} tokens/s"
    )
    yield (
        f"Busy: learner {one.learner_busy:.0%} (waits for groups {one.learner_waits:.0%}), engines "
        f"{one.engines_busy:.0%}, reward workers {one.scorers_busy:.0%}, judge calls {one.judge_busy:.0%}; "
        f"the limit: {one.bottleneck}"
    )
    ages = ", ".join(f"{age}: {share:.0%}" for age, share in one.staleness.items())
    yield f"Staleness of trained groups: {ages}"
    if one.engine_deaths or one.learner_deaths or one.tickets_dropped:
        yield (
            f"Failures: {one.engine_deaths} engines, {one.learner_deaths} times the learner; {one.steps_undone} steps "
            f"done again, {one.tickets_dropped} prompts dropped"
        )
    yield f"Tokens written and not trained: {one.lost_share:.1%}"
    yield f"1,000 steps: {short(one.gpu_hours_per_1000)} GPU-hours, {short(one.usd_per_1000)} USD"


def sweep_table(pairs: Sequence[tuple[Figures, Figures | None]]) -> Iterator[str]:
    """Markdown: one line per number of GPUs, with failures beside where they were simulated."""
    yield (
        "| GPUs | learner + engines | window | prompts/step | step, s | completions/s | per GPU | limit | "
        "GPU-h / 1,000 steps | with failures: completions/s | engines lost | restarts | steps again |"
    )
    yield "| " + " | ".join(["---"] * 13) + " |"
    for one, failing in pairs:
        cells: list[Any] = [
            f"{one.gpus:,}",
            f"{one.learner_ranks} + {one.num_engines}",
            one.max_staleness,
            f"{one.groups_per_step:,}",
            f"{one.step_s:.1f}",
            short(one.completions_per_s),
            f"{one.completions_per_s / one.gpus:.2f}",
            one.bottleneck,
            short(one.gpu_hours_per_1000),
        ]
        if failing is None:
            cells += ["", "", "", ""]
        else:
            cells += [
                short(failing.completions_per_s),
                failing.engine_deaths,
                failing.learner_deaths,
                failing.steps_undone,
            ]
        yield "| " + " | ".join(map(str, cells)) + " |"
