"""The numbers of a run in one file, and whether they reach the goals set for the quickstart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sif_ray.observe.run_files import RunFiles, read_run
from sif_ray.observe.run_folder import write_json
from sif_ray.observe.timeline import Span, busy_share, merge_intervals, overlap_share

MAX_SECONDS = 20 * 60.0
MIN_SCENES = 300
MIN_VALIDITY = 0.95
MIN_ABOVE_CHANCE = 0.25
MIN_TYPES_ABOVE_CHANCE = 2
MIN_IOU_ABOVE_BLIND = 0.15
MAX_PARITY = 1e-3  # mean |delta log-prob|, engine against learner, in fp32


@dataclass(frozen=True)
class Check:
    """One goal. `value` None = nothing was measured, which does not reach it."""

    name: str
    value: float | None
    goal: str
    ok: bool


def write_summary(run_dir: str | Path) -> Path:
    """Write summary.json into the folder of a quickstart run."""
    return write_json(Path(run_dir) / "summary.json", build_summary(run_dir))


def build_summary(run_dir: str | Path) -> dict[str, Any]:
    """Stage seconds, dataset counts, warm-up, GRPO, evaluation, the served answer, and `checks`.

    The block of a stage that has not run is None.
    """
    return summarise(read_run(run_dir))


def summarise(run: RunFiles) -> dict[str, Any]:
    """As `build_summary`, of a run already read. Numbers that are not finite become None."""
    response = None if run.response is None else _served(run.response)
    summary: dict[str, Any] = _finite(
        {
            "stage_seconds": run.stage_seconds,
            "total_seconds": sum(run.stage_seconds.values()),
            "dataset": run.dataset_counts() or None,
            "warmup": _warmup(run.warmup) if run.warmup else None,
            "grpo": _grpo(run) if run.grpo else None,
            "evaluation": _evaluation(run),
            "served": response,
            "environment": run.environment,
            "checks": [asdict(check) for check in checks(run)],
        }
    )
    return summary


def sampled_arm(run: RunFiles) -> str:
    """Name of the arm that samples as GRPO did."""
    return f"sampled_T{float(run.grpo_config.sampling.temperature)}"


def column(records: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the records that have a finite `name`."""
    pairs = [(record["step"], record[name]) for record in records if np.isfinite(record.get(name, np.nan))]
    return [step for step, _ in pairs], [value for _, value in pairs]


# --- goals -----------------------------------------------------------------------------------------------------------


def checks(run: RunFiles) -> list[Check]:
    """Every goal in numbers that the quickstart has, reached or not."""
    return [
        _check(
            "all stages together",
            sum(run.stage_seconds.values()) if run.stage_seconds else None,
            f"at most {MAX_SECONDS:g} s",
            lambda value: value <= MAX_SECONDS,
        ),
        *_evaluation_checks(run),
        *_loop_checks(run),
        _check(
            "the served answer has steps, boxes with depth and an answer",
            None if run.response is None else float(_is_complete(run.response["response"])),
            "1 (yes)",
            lambda value: value == 1,
        ),
    ]


def _check(name: str, value: float | None, goal: str, reached: Callable[[float], bool]) -> Check:
    return Check(name, value, goal, value is not None and bool(reached(value)))


def _evaluation_checks(run: RunFiles) -> Iterator[Check]:
    before, after = run.compared or (None, None)
    greedy, blind = _arm(run, after, "greedy"), _arm(run, after, "greedy_blind")
    yield _check(
        "held-out scenes",
        None if run.results is None else run.results["num_scenes"],
        f"at least {MIN_SCENES}",
        lambda value: value >= MIN_SCENES,
    )
    warm = _arm(run, before, "greedy")
    yield _check(
        "format validity after warm-up, greedy",
        None if warm is None else warm["means"]["format"]["mean"],
        f"at least {MIN_VALIDITY}",
        lambda value: value >= MIN_VALIDITY,
    )
    types = None if greedy is None else greedy["answer_by_type"].values()
    yield _check(
        f"question types answered {MIN_ABOVE_CHANCE} above chance, greedy",
        None if types is None else sum(kind["mean"] >= kind["chance"] + MIN_ABOVE_CHANCE for kind in types),
        f"at least {MIN_TYPES_ABOVE_CHANCE}",
        lambda value: value >= MIN_TYPES_ABOVE_CHANCE,
    )
    yield _check(
        "last-box IoU above the blind control, greedy",
        greedy["means"]["iou_last"]["mean"] - blind["means"]["iou_last"]["mean"] if greedy and blind else None,
        f"at least {MIN_IOU_ABOVE_BLIND}",
        lambda value: value >= MIN_IOU_ABOVE_BLIND,
    )
    paired = run.results["paired"] if run.results else {}
    sampled = sampled_arm(run)
    yield _check(
        f"gain of total reward at T = {run.grpo_config.sampling.temperature:g}, lower end of its interval",
        paired[sampled]["total"]["ci95"][0] if sampled in paired else None,
        "above 0",
        lambda value: value > 0,
    )
    for arm in (sampled, "greedy"):
        for term, label in (("iou_last", "last-box IoU"), ("answer", "answer accuracy")):
            yield _check(
                f"gain of {label}, {arm_label(arm)}, upper end of its interval",
                paired[arm][term]["ci95"][1] if arm in paired else None,
                "at least 0: not paid for with this term",
                lambda value: value >= 0,
            )


def _loop_checks(run: RunFiles) -> Iterator[Check]:
    window = run.grpo_config.max_staleness
    yield _check(
        "largest staleness", _extreme(run, "staleness_max"), f"at most {window}", lambda value: value <= window
    )
    yield _check(
        "largest engine-learner difference of log-probs (mean over tokens)",
        _extreme(run, "parity_mean_abs"),
        f"below {MAX_PARITY:g}",
        lambda value: value < MAX_PARITY,
    )


def arm_label(arm: str) -> str:
    """How an arm is called in prose: "greedy", "T = 0.5", "greedy, blind"."""
    if arm.startswith("sampled_T"):
        return f"T = {float(arm.removeprefix('sampled_T')):g}"
    return arm.replace("greedy_", "greedy, ").replace("_", " ")


def _arm(run: RunFiles, checkpoint: str | None, arm: str) -> dict[str, Any] | None:
    if run.results is None or checkpoint is None:
        return None
    found: dict[str, Any] | None = run.results["checkpoints"][checkpoint]["arms"].get(arm)
    return found


def _extreme(run: RunFiles, name: str) -> float | None:
    return max(column(run.grpo, name)[1], default=None)


# --- blocks ----------------------------------------------------------------------------------------------------------


def _warmup(records: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    steps, losses = column(records, "loss")
    return {"steps": int(steps[-1]), "loss_first": losses[0], "loss_last": losses[-1]} if steps else {"steps": 0}


def _grpo(run: RunFiles) -> dict[str, Any]:
    def mean(name: str) -> float | None:
        values = column(run.grpo, name)[1]
        return float(np.mean(values)) if values else None

    return {
        "steps": len(run.grpo),
        "group_size": run.grpo_config.group_size,
        "groups_per_step": run.grpo_config.groups_per_step,
        "staleness_max": _extreme(run, "staleness_max"),
        "staleness_mean": mean("staleness_mean"),
        "max_staleness": run.grpo_config.max_staleness,
        "parity_mean_abs": {"mean": mean("parity_mean_abs"), "max": _extreme(run, "parity_mean_abs")},
        "completions_per_s": mean("completions_per_s"),
        "generated_tokens_per_s": mean("generated_tokens_per_s"),
        "sync_s": mean("sync_s"),
        "busy_share": busy_shares(run.timeline),
        "engine_and_learner_busy_share": engine_learner_overlap(run.timeline),
    }


def busy_shares(spans: Sequence[Span]) -> dict[str, float]:
    """{lane: share of the whole timeline in which it does anything but wait}."""
    kinds = {span.kind for span in spans} - {"wait"}
    return {lane: busy_share(spans, lane, kinds) for lane in sorted({span.lane for span in spans})}


def engine_learner_overlap(spans: Sequence[Span]) -> float:
    """Share of the timeline in which some engine generates while some learner trains: what asynchrony buys."""
    generating = merge_intervals((span.start_s, span.end_s) for span in spans if span.kind == "generate")
    training = merge_intervals((span.start_s, span.end_s) for span in spans if span.kind == "train")
    return overlap_share(spans, generating, training)


def _evaluation(run: RunFiles) -> dict[str, Any] | None:
    results = run.results
    if results is None:
        return None
    block: dict[str, Any] = {name: results[name] for name in ("num_scenes", "num_items", "comparison", "paired")}
    block["checkpoints"] = {}
    for name, checkpoint in results["checkpoints"].items():
        arms = checkpoint["arms"]
        block["checkpoints"][name] = {
            "format_validity_greedy": arms["greedy"]["means"]["format"]["mean"],
            "iou_last_greedy": arms["greedy"]["means"]["iou_last"],
            "iou_last_blind": arms["greedy_blind"]["means"]["iou_last"],
            "answer_by_type": {
                kind: found | {"blind": arms["greedy_blind"]["answer_by_type"][kind]["mean"]}
                for kind, found in arms["greedy"]["answer_by_type"].items()
            },
            "means": {arm: found["means"] for arm, found in arms.items()},
            "above_controls": checkpoint["sight"],
        }
    return block


def _served(record: Mapping[str, Any]) -> dict[str, Any]:
    response = record["response"]
    return {
        "question": record["question"],
        "truth": record["truth"],
        "answer": response["answer"],
        "valid": response["valid"],
        "steps": response["steps"],
        "seconds": response["seconds"],
    }


def _is_complete(response: Mapping[str, Any]) -> bool:
    boxes = [box for step in response["steps"] for box in step["boxes"]]
    return bool(response["valid"] and response["answer"] and boxes and all(box["depth"] is not None for box in boxes))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value
