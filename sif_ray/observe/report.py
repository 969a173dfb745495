"""The run as one HTML file: pictures, curves and numbers, with nothing outside the file.

Charts are drawn from numbers in per cent (`charts`), examples from boxes over pictures (`examples`); the template
escapes every text, and a content policy lets the page run its own script only.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sif_ray import config as configuration
from sif_ray.config import GrpoConfig, QuickstartConfig
from sif_ray.method.trace import find_answer
from sif_ray.observe import charts
from sif_ray.observe.examples import RULE, examples, served_example
from sif_ray.observe.page import add_open_argument, show, templates
from sif_ray.observe.progress import format_seconds
from sif_ray.observe.run_files import RunFiles, read_run
from sif_ray.observe.run_folder import write_text
from sif_ray.observe.summary import arm_label, column, sampled_arm, summarise

PAGE = "report.html"
REWARD_PLOTS = (
    ("reward/total", "total reward", "weighted sum"),
    ("reward/format", "format", "share of valid traces"),
    ("reward/answer", "answer", "judge's score and bonus"),
    ("reward/box", "box", "hierarchical IoU and bonus"),
    ("reward/depth", "depth", "share of depths within 10 %"),
    ("iou_last", "last-box IoU", "hierarchical IoU, no reward"),
    ("eval/total", "total reward, held out", "greedy, the same items every time"),
)
PACE_PLOTS = (
    ("engine_idle_share", "engines without a request", "share of the step"),
    ("learner_idle_share", "learner without a batch", "share of the step"),
    ("sync_s", "weight transfer", "seconds per step"),
    ("judge/latency_p95_s", "judge", "seconds per call, 95th percentile"),
)
HEALTH_PLOTS = (
    ("entropy", "entropy", "nats per token"),
    ("kl", "KL to the warm-up policy", "nats per token"),
    ("clip_share", "clipped", "share of tokens"),
    ("no_spread_share", "groups without reward spread", "share of groups; they teach nothing"),
    ("completion_tokens_mean", "completion length", "tokens"),
    ("generated_tokens_per_s", "generation", "tokens/s"),
    ("parity_mean_abs", "engine against learner", "mean |Δ log-prob|"),
)
TERM_LABELS = {
    "total": "total reward",
    "format": "format",
    "answer": "answer",
    "box": "box",
    "depth": "depth",
    "iou_last": "last-box IoU",
}


def write_report(run_dir: str | Path) -> Path:
    """Write the page of a run so far to report.html in its folder and return its path."""
    return write_text(Path(run_dir) / PAGE, render(read_run(run_dir)))


def render(run: RunFiles) -> str:
    """The page."""
    summary = summarise(run)
    environment = templates()
    source = environment.get_template("report.js").render()
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    return environment.get_template("report.html.jinja").render(
        script=source,
        script_hash=f"sha256-{digest}",
        summary=summary,
        headline=headline(run),
        whole=isinstance(run.config, QuickstartConfig),
        is_toy=run.is_toy,
        tiles=tiles(run, summary),
        rule=RULE,
        examples=examples(run),
        served=served_example(run.response) if run.response else None,
        rewards=[plot for entry in REWARD_PLOTS if (plot := _plot(run.grpo, *entry, "kind-train"))],
        weights=run.grpo_config.rewards,
        kept=kept_completions(run),
        pace=[plot for entry in PACE_PLOTS if (plot := _plot(run.grpo, *entry, "kind-generate", from_zero=True))],
        health=[plot for entry in HEALTH_PLOTS if (plot := _plot(run.grpo, *entry, "kind-sync"))],
        warmup=_plot(run.warmup, "loss", "warm-up loss", "nats per assistant token", "kind-generate", from_zero=True),
        ages=token_ages(run.grpo, run.grpo_config.max_staleness),
        lanes=charts.lane_chart(run.timeline) if run.timeline else None,
        types=question_types(run),
        comparison=comparison(run),
        controls=controls(run),
        stages=stage_bars(run.stage_seconds),
        differences=configuration.differences(run.config),
    )


def _plot(
    records: Sequence[Mapping[str, float]],
    name: str,
    title: str,
    unit: str,
    css_class: str,
    from_zero: bool = False,
) -> charts.Plot | None:
    steps, values = column(records, name)
    return charts.line_plot(title, unit, steps, values, css_class, from_zero) if values else None


# --- words and key figures -------------------------------------------------------------------------------------------


def headline(run: RunFiles) -> tuple[str, str]:
    """One sentence on what GRPO did to the reward, and one on how sure that is."""
    if isinstance(run.config, GrpoConfig):
        return _progress(run)
    paired = run.results["paired"] if run.results else {}
    arm = sampled_arm(run)
    if run.compared is None or arm not in paired:
        return "This run has not been evaluated", "Curves and times below are of the stages that ran."
    before, after = (_means(run, name, arm)["total"]["mean"] for name in run.compared)
    change = paired[arm]["total"]
    low, high = change["ci95"]
    verb = "raised" if low > 0 else "lowered" if high < 0 else "did not clearly move"
    numbers = f"from {before:.2f} to {after:.2f}"
    first = (
        f"GRPO-SIF {verb} the reward {numbers}" if verb.endswith("ed") else f"GRPO-SIF {verb} the reward ({numbers})"
    )
    assert run.results is not None
    second = (
        f"Mean total reward at the training temperature ({arm_label(arm)}) on {run.results['num_scenes']} held-out "
        f"scenes: {change['difference']:+.3f}, 95 % interval [{low:+.3f}, {high:+.3f}], paired by item and resampled "
        "by scene."
    )
    return first, second


def _progress(run: RunFiles) -> tuple[str, str]:
    """`headline` of a GRPO run alone, which has no evaluation beside that of its loop."""
    steps, totals = column(run.grpo, "reward/total")
    if not steps:
        return "GRPO-SIF has made no step yet", "Curves and times appear with the first one."
    few = max(1, min(20, len(totals) // 4))
    first, last = float(np.mean(totals[:few])), float(np.mean(totals[-few:]))
    of = f" {few} steps" if few > 1 else " step"
    second = f"Mean total reward of the rollouts: {first:.2f} in the first{of}, {last:.2f} in the last{of}."
    at_steps, heldout = column(run.grpo, "eval/total")
    if heldout:
        second += f" Held out, greedy: {heldout[0]:.2f} at step {at_steps[0]:g}, {heldout[-1]:.2f} at {at_steps[-1]:g}."
    else:
        second += " Those are the prompts it trains on; no evaluation was asked for (eval_every)."
    return f"GRPO-SIF {'finished after' if run.grpo_finished else 'at'} step {steps[-1]:g}", second


def tiles(run: RunFiles, summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """The row of key figures: {"label", "value", "note"}."""
    found: list[dict[str, str]] = []

    def tile(label: str, value: str, note: str) -> None:
        found.append({"label": label, "value": value, "note": note})

    if run.compared:
        first, last = (_means(run, name, "greedy") for name in run.compared)
        blind = _means(run, run.compared[1], "greedy_blind")
        for term, label in (("answer", "answers right, greedy"), ("iou_last", "last-box IoU, greedy")):
            value = f"{first[term]['mean']:.2f} → {last[term]['mean']:.2f}"
            tile(label, value, f"{blind[term]['mean']:.2f} when shown another scene")
        tile(
            "valid traces, greedy",
            f"{100 * last['format']['mean']:.1f} %",
            f"{100 * first['format']['mean']:.1f} % after warm-up",
        )
    grpo = summary["grpo"]
    if grpo and isinstance(run.config, GrpoConfig) and grpo["generated_tokens_per_s"] is not None:
        tile("generated", charts.short(grpo["generated_tokens_per_s"]), "tokens/s, mean of all steps")
    if grpo and grpo["staleness_max"] is not None:
        tile("largest staleness", f"{grpo['staleness_max']:g}", f"policy versions; window {grpo['max_staleness']}")
    if grpo and grpo["parity_mean_abs"]["max"] is not None:
        tile("engine against learner", charts.short(grpo["parity_mean_abs"]["max"]), "largest mean |Δ log-prob|")
    if grpo and run.timeline:
        share = 100 * grpo["engine_and_learner_busy_share"]
        tile("generating while training", f"{share:.0f} %", "of the GRPO time, both are busy")
    if run.stage_seconds:
        tile("all stages", format_seconds(summary["total_seconds"]), f"min:s on {run.environment['num_cpus']} cores")
    return found


# --- training --------------------------------------------------------------------------------------------------------


def token_ages(records: Sequence[Mapping[str, float]], window: int) -> list[tuple[int, float]]:
    """(policy versions behind the learner, per cent of all trained tokens), from 0 to at least `window`."""
    tokens: dict[int, float] = dict.fromkeys(range(window + 1), 0.0)
    for record in records:
        for name, share in record.items():
            family, _, age = name.partition("/")
            if family == "staleness" and np.isfinite(share):
                tokens[int(age)] = tokens.get(int(age), 0.0) + share * record["trained_tokens"]
    total = sum(tokens.values())
    return [(age, 100 * tokens[age] / total) for age in sorted(tokens)] if total else []


def kept_completions(run: RunFiles) -> list[dict[str, Any]]:
    """Best and worst completion of the first, the middle and the last step that has pictures."""
    drawn = [line for line in run.completions if line["picture"] and (run.grpo_path / line["picture"]).exists()]
    steps = sorted({line["step"] for line in drawn})
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []
    return [_kept(run.grpo_path / line["picture"], line) for line in drawn if line["step"] in chosen]


def _kept(path: Path, line: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **line,
        "answer": find_answer(line["text"]) or "no answer",
        "picture": f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}",
        "size": Image.open(path).size,
    }


# --- evaluation ------------------------------------------------------------------------------------------------------


def _means(run: RunFiles, checkpoint: str, arm: str) -> dict[str, Any]:
    assert run.results is not None
    means: dict[str, Any] = run.results["checkpoints"][checkpoint]["arms"][arm]["means"]
    return means


def question_types(run: RunFiles) -> list[dict[str, Any]]:
    """Greedy answer accuracy by question type: before and after with intervals, chance and the controls."""
    if run.compared is None or run.results is None:
        return []
    before, after = (run.results["checkpoints"][name]["arms"] for name in run.compared)
    rows = []
    for kind, found in after["greedy"]["answer_by_type"].items():
        controls = {
            label: 100 * after[arm]["answer_by_type"][kind]["mean"]
            for arm, label in (("greedy_blind", "blind"), ("greedy_swapped_depth", "swapped"))
            if arm in after
        }
        rows.append(
            {
                "kind": kind,
                "n": found["n"],
                "chance": 100 * found["chance"],
                "controls": controls,
                "before": _bar(before["greedy"]["answer_by_type"][kind]),
                "after": _bar(found),
            }
        )
    return rows


def _bar(estimate: Mapping[str, Any]) -> charts.Mark:
    return charts.mark(estimate["mean"], estimate["ci95"], 0.0, 1.0)


def comparison(run: RunFiles) -> list[dict[str, Any]]:
    """Before and after GRPO by arm and term; the differences of one arm share one axis around 0."""
    if run.compared is None or run.results is None:
        return []
    before, after = run.compared
    paired = run.results["paired"]
    sampled = sampled_arm(run)
    others = [arm for arm in paired if arm.startswith("sampled_") and arm != sampled]
    arms = [arm for arm in (sampled, *others, "greedy") if arm in paired]
    reach = max([abs(end) for arm in arms for change in paired[arm].values() for end in change["ci95"]] + [1e-6])
    return [
        {
            "arm": arm_label(arm),
            "is_training": arm == sampled,
            "rows": [
                {
                    "label": label,
                    "before": _words(_means(run, before, arm)[term]),
                    "after": _words(_means(run, after, arm)[term]),
                    "change": charts.mark(change["difference"], change["ci95"], -reach, reach, signed=True),
                    "verdict": _verdict(change["ci95"]),
                }
                for term, label in TERM_LABELS.items()
                for change in [paired[arm][term]]
            ],
        }
        for arm in arms
    ]


def controls(run: RunFiles) -> list[dict[str, Any]]:
    """What the policy after GRPO scores with the right images, another scene's depth, and another scene's images."""
    if run.compared is None or run.results is None:
        return []
    arms = run.results["checkpoints"][run.compared[1]]["arms"]
    shown = [arm for arm in ("greedy", "greedy_swapped_depth", "greedy_blind") if arm in arms]
    terms = ("answer", "iou_last", "depth", "total")
    return [
        {"label": TERM_LABELS[term], "values": {arm: _words(arms[arm]["means"][term]) for arm in shown}}
        for term in terms
    ]


def _words(estimate: Mapping[str, Any]) -> dict[str, str]:
    low, high = estimate["ci95"]
    return {"mean": f"{estimate['mean']:.3f}", "interval": f"{low:.3f} to {high:.3f}"}


def _verdict(ci95: Sequence[float]) -> str:
    low, high = ci95
    return "up" if low > 0 else "down" if high < 0 else "open"


def stage_bars(stage_seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    """One bar per stage, as wide as its share of the longest."""
    longest = max(stage_seconds.values(), default=0.0) or 1.0
    return [
        {"name": name, "width": 100 * seconds / longest, "seconds": seconds} for name, seconds in stage_seconds.items()
    ]


# --- sif-ray report --------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="folder of a quickstart or of a GRPO run, which may be at work")
    parser.add_argument("--output", metavar="FILE.html", help=f"where the page goes (default: {PAGE} in RUN)")
    add_open_argument(parser)


def run(options: argparse.Namespace) -> None:
    """Raises `ConfigError` where RUN is no such run."""
    found = read_run(options.folder)
    page = write_text(Path(options.output or found.path / PAGE), render(found))
    print("\n".join([*headline(found), str(page)]))
    show(page, options.open)
