"""The suite `overlap`: the asynchronous loop beside the same loop on-policy, on the same work.

Both are the stage `grpo` with a judge over HTTP that answers after 300 ms, and completions of which one in eight is
many times longer than the others (`answering_policy`); prompts and sampling seeds are equal. With `max_staleness` = 0
generation, judge and learner take turns: everything waits for the longest completion of a step, then for its verdict,
then for the update. Rates are those of whole runs, from the first rollout to the last update: the work is the same
then, which it is not between two steps in the middle, since long completions are trained late.

A stage is busy while something of its kind is under way: an engine with one sequence is as busy as one with a hundred.

All stages share the cores of one machine. Where the on-policy run keeps c of C at work in the mean, an order of the
work that keeps them all at work is C / c times as fast, and more only as far as larger batches save work: that is given
with the figures.
"""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from sif_ray.bench.answering_policy import LONG_SHARE, LONG_TOKENS, SHORT_TOKENS, write_answering_policy
from sif_ray.bench.chat_server import chat_server
from sif_ray.bench.findings import Findings, Goal, interleaved, share, spread
from sif_ray.bench.toy_dataset import write_dataset
from sif_ray.bench.training_run import Middle, TrainingLoad, make_config, middle_figures, run
from sif_ray.config import GrpoConfig, JudgeConfig

log = logging.getLogger(__name__)

OVER_ON_POLICY = 1.6
WALL_OVER_BUSIEST = 1.15


@dataclass(frozen=True)
class Load(TrainingLoad):
    """How much work."""

    steps: int = 20
    max_tokens: int = 384  # a third of the long completions would be longer still


def measure(repetitions: int, load: Load = Load()) -> Findings:
    """Both modes in turns."""
    with tempfile.TemporaryDirectory(prefix="sif_ray-bench-") as name:
        folder = Path(name)
        write_dataset(folder / "data", load.steps * load.groups_per_step)
        config = make_config(folder, write_answering_policy(folder / "policy", long_tailed=True), load)
        modes = {"asynchronous": config, "on_policy": replace(config, max_staleness=0)}
        found = interleaved(
            {mode: partial(_turn, mode, of, load.judge_latency_s) for mode, of in modes.items()}, repetitions
        )
    rates = {mode: [one.tokens_per_s for one in middles] for mode, middles in found.items()}
    gain = share(rates["asynchronous"], rates["on_policy"])
    over_busiest = [one.seconds / one.busiest_s for one in found["asynchronous"]]
    goals = [
        Goal("tokens/s, of those on-policy", gain, OVER_ON_POLICY, at_least=True),
        Goal(
            "seconds, of those in which the busiest stage is busy",
            statistics.median(over_busiest),
            WALL_OVER_BUSIEST,
            at_least=False,
        ),
    ]
    figures = {
        "load": asdict(load),
        "lengths": {"short_tokens": SHORT_TOKENS, "long_tokens": LONG_TOKENS, "long_share": LONG_SHARE},
        "tokens_per_s": {mode: spread(values) for mode, values in rates.items()},
        "seconds_over_busiest": spread(over_busiest),
        "gain_with_all_cores_at_work": spread([(os.cpu_count() or 1) / one.cores for one in found["on_policy"]]),
        **{mode: middle_figures(middles) for mode, middles in found.items()},
    }
    return Findings(goals, figures)


def _turn(mode: str, config: GrpoConfig, judge_latency_s: float) -> Middle:
    with chat_server(judge_latency_s) as server:
        judge = JudgeConfig(kind="llm", model="bench", base_url=server.base_url)
        middle, _ = run(replace(config, judge=judge), edge=0)
    log.info(
        "bench overlap: %s, %.0f tokens/s, %.1f completions/s, %.2f cores at work",
        mode,
        middle.tokens_per_s,
        middle.completions_per_s,
        middle.cores,
    )
    return middle
