"""`sif-ray plan`: its arguments; the work is `sif_ray.plan.search` and `sif_ray.plan.simulation`."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from sif_ray import config as configuration
from sif_ray.config import ConfigError, GrpoConfig
from sif_ray.plan.gpus import GPUS, find_gpu
from sif_ray.plan.rates import Assumptions, workload_of
from sif_ray.plan.scenario import Failures, Scenario
from sif_ray.plan.search import Division, Request, search
from sif_ray.resources.plan import shape_complaints
from sif_ray.resources.shapes import find_shape

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `run`."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the configuration's")
    parser.add_argument("--config", metavar="FILE", help="configuration of the run (default: all defaults)")
    parser.add_argument(
        "--from-run",
        metavar="DIR",
        help="take rates and lengths from this finished run, and its configuration; instead of --config and --gpu",
    )
    parser.add_argument("--gpu", default="", metavar="NAME", help=f"one of {', '.join(GPUS)}")
    parser.add_argument(
        "--gpus",
        type=int,
        default=0,
        metavar="N",
        help="divide so many between learner and engines (default: as the configuration does)",
    )
    parser.add_argument("--sweep", default="", metavar="N,N,...", help="as --gpus, for several numbers")
    parser.add_argument(
        "--scale-batch",
        action="store_true",
        help="in a sweep, prompts per step, reward workers and calls of the judge grow with the GPUs",
    )
    parser.add_argument("--prompt-tokens", type=int, default=0, metavar="N", help="(default: from max_pixels)")
    parser.add_argument("--response-tokens", type=float, default=400.0, metavar="N", help="mean (default: 400)")
    parser.add_argument("--response-cv", type=float, default=0.6, metavar="X", help="deviation / mean (default: 0.6)")
    parser.add_argument(
        "--judge-latency-s", type=float, default=0.5, metavar="S", help="of a call (default: 0.5); 0 = none"
    )
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="to simulate (default: 200)")
    parser.add_argument(
        "--mtbf-h",
        type=float,
        default=0.0,
        metavar="H",
        help="mean hours between failures of one GPU; 0 = none. 50,000 is what arXiv 2407.21783 saw",
    )
    parser.add_argument("--judge-outage-every-h", type=float, default=0.0, metavar="H", help="0 = never")
    parser.add_argument("--judge-outage-s", type=float, default=60.0, metavar="S", help="(default: 60)")
    parser.add_argument("--usd-per-gpu-hour", type=float, default=None, metavar="USD", help="(default: an example)")
    parser.add_argument("--assume", action="append", default=[], metavar="name=value", help="change an assumption")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures too")
    parser.add_argument("--figure", type=Path, metavar="OUT.svg", help="of a sweep: completions/s over GPUs")


def run(options: argparse.Namespace) -> None:
    """Print the plan. Raises `ConfigError` for a request that cannot work."""
    _check(options)
    failures = Failures(options.mtbf_h, options.judge_outage_every_h, options.judge_outage_s)
    started_s = time.monotonic()
    if options.from_run:
        lines, found = _plan_from_run(options, failures)
    elif options.sweep:
        lines, found = _sweep(options, failures)
    else:
        lines, found = _plan(options, failures)
    sys.stdout.write("\n".join(lines) + "\n")
    if options.json:
        from sif_ray.observe.run_folder import write_json

        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, found | {"seconds": round(time.monotonic() - started_s, 1)})


def _check(options: argparse.Namespace) -> None:
    for name in ("response_tokens", "steps"):
        if getattr(options, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be positive")
    positive_or_zero = ("gpus", "prompt_tokens", "response_cv", "judge_latency_s", "mtbf_h", "judge_outage_every_h")
    for name in (*positive_or_zero, "judge_outage_s"):
        if getattr(options, name) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be 0 or more")
    if options.from_run and (options.config or options.gpu or options.gpus or options.sweep):
        raise ConfigError("--from-run: the run says what --config, --gpu, --gpus and --sweep would; leave them out")
    if not options.from_run and not options.gpu:
        raise ConfigError(f"--gpu '': name the GPU ({', '.join(GPUS)}), or a finished run with --from-run")
    if options.figure and (not options.sweep or options.figure.suffix != ".svg"):
        raise ConfigError(f"--figure {options.figure}: a sweep is drawn, as .svg; give --sweep and such a name")


def _check_outages(options: argparse.Namespace, config: GrpoConfig) -> None:
    longest_s = config.judge.max_wait_s
    if options.judge_outage_every_h and options.judge_outage_s > longest_s:
        raise ConfigError(
            f"--judge-outage-s {options.judge_outage_s:g}: a run ends when its judge has answered nobody for "
            f"judge.max_wait_s = {longest_s:g}; plan with shorter outages, or set judge.max_wait_s"
        )


# --- from data sheets ------------------------------------------------------------------------------------------------


def _request(options: argparse.Namespace) -> tuple[Request, str]:
    config: GrpoConfig = configuration.load("grpo", options.config, options.overrides)
    if config.placement.colocate:
        raise ConfigError(
            "placement.colocate = True: how much learner and engine slow each other on one GPU is not known; plan with "
            "placement.colocate=false"
        )
    _check_outages(options, config)
    gpu = find_gpu(options.gpu)
    config = replace(config, placement=replace(config.placement, gpu_memory_gib=gpu.memory_gib))
    shape, source = find_shape(config.policy)
    if shape is None:
        raise ConfigError(f"policy = {config.policy!r}: {source}; name the policy after its shape, e.g. qwen2.5-vl-7b")
    for complaint in shape_complaints(config, shape):
        raise ConfigError(complaint)
    workload = workload_of(
        config,
        shape,
        prompt_tokens=options.prompt_tokens,
        response_tokens=options.response_tokens,
        response_cv=options.response_cv,
    )
    usd = gpu.usd_per_hour if options.usd_per_gpu_hour is None else options.usd_per_gpu_hour
    assumed = _assumptions(options.assume)
    request = Request(
        config, shape, replace(gpu, usd_per_hour=usd), workload, assumed, options.judge_latency_s, options.seed
    )
    return request, source


def _assumptions(changes: Sequence[str]) -> Assumptions:
    known = {item.name for item in fields(Assumptions)}
    values: dict[str, float] = {}
    for change in changes:
        name, _, text = change.partition("=")
        if name not in known:
            raise ConfigError(f"--assume {change}: there is no {name!r}; there are {', '.join(sorted(known))}")
        try:
            values[name] = float(text)
        except ValueError as error:
            raise ConfigError(f"--assume {change}: {text!r} is no number") from error
        if values[name] <= 0:
            raise ConfigError(f"--assume {change}: must be positive")
    return Assumptions(**values)


def _plan(options: argparse.Namespace, failures: Failures) -> tuple[list[str], dict[str, Any]]:
    from sif_ray.plan import report
    from sif_ray.plan.figures import figures_of
    from sif_ray.plan.simulation import simulate

    request, source = _request(options)
    lines, candidates = [], []
    if options.gpus:
        candidates = search(request, options.gpus)
        division = _division(candidates[0])
        lines = [
            f"Divisions of {options.gpus} GPUs, simulated (* = best)",
            *report.table(candidates[: report.SHOWN]),
            "",
        ]
    else:
        config = request.config
        division = Division(config.learner.num_ranks, config.num_engines, config.max_staleness)
    scenario = request.scenario(division, options.steps, failures)
    figures = figures_of(simulate(scenario), request.gpu.usd_per_hour)
    lines += [
        f"{figures.gpus} {options.gpu}: {figures.learner_ranks} learner ranks, {figures.num_engines} engines of "
        f"{scenario.gpus_per_engine}, max_staleness {figures.max_staleness}, {options.steps} steps simulated",
        *report.summary(figures),
        *report.memory_lines(request, source, figures),
        *report.rate_lines(scenario),
        *report.assumption_lines(request),
    ]
    return lines, {"plan": figures.as_json(), "candidates": [one.as_json() for one in candidates]}


def _division(figures: Any) -> Division:
    return Division(figures.learner_ranks, figures.num_engines, figures.max_staleness)


def _sweep(options: argparse.Namespace, failures: Failures) -> tuple[list[str], dict[str, Any]]:
    from sif_ray.plan import report
    from sif_ray.plan.figure import scaling_svg
    from sif_ray.plan.figures import Figures, figures_of
    from sif_ray.plan.simulation import simulate

    sizes = _sizes(options.sweep)
    request, _ = _request(options)
    pairs: list[tuple[Figures, Figures | None]] = []
    for size in sizes:
        scaled = _scaled(request, size // sizes[0]) if options.scale_batch else request
        log.info("%d GPUs: %d prompts per step", size, scaled.config.groups_per_step)
        division = _division(search(scaled, size)[0])
        found = [
            figures_of(simulate(scaled.scenario(division, options.steps, breaks)), request.gpu.usd_per_hour)
            for breaks in ([Failures(), failures] if failures != Failures() else [Failures()])
        ]
        pairs.append((found[0], found[1] if len(found) > 1 else None))
    lines = [*report.sweep_table(pairs), "", *report.assumption_lines(request)]
    if options.figure:
        from sif_ray.observe.run_folder import write_text

        options.figure.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.figure, scaling_svg(pairs))
    sweep = [{"plan": one.as_json(), "with_failures": two.as_json() if two else None} for one, two in pairs]
    return lines, {"sweep": sweep}


def _scaled(request: Request, factor: int) -> Request:
    """`factor` times the prompts of a step, with as many times the reward workers and calls of the judge."""
    config = request.config
    return replace(
        request,
        config=replace(
            config,
            groups_per_step=factor * config.groups_per_step,
            num_reward_workers=factor * config.num_reward_workers,
            judge=replace(config.judge, max_concurrency=factor * config.judge.max_concurrency),
        ),
    )


def _sizes(text: str) -> list[int]:
    try:
        sizes = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise ConfigError(f"--sweep {text}: give numbers of GPUs, e.g. 8,64,512,4096") from error
    if sizes[0] < 2:
        raise ConfigError(f"--sweep {text}: a learner and an engine take 2 GPUs at least")
    return sizes


# --- from a run ------------------------------------------------------------------------------------------------------


def _plan_from_run(options: argparse.Namespace, failures: Failures) -> tuple[list[str], dict[str, Any]]:
    from sif_ray.plan import report
    from sif_ray.plan.figures import figures_of
    from sif_ray.plan.measured import read_measurements
    from sif_ray.plan.simulation import simulate

    measured = read_measurements(Path(options.from_run))
    config: GrpoConfig = configuration.load("grpo", str(Path(options.from_run) / "config.yaml"), options.overrides)
    _check_outages(options, config)
    scenario = replace(scenario_of(config, measured, options.steps, options.seed), failures=failures)
    figures = figures_of(simulate(scenario), options.usd_per_gpu_hour or 0.0)
    lines = [
        f"As measured in {options.from_run}: {measured.groups} groups, {measured.steps} steps",
        *report.rate_lines(scenario),
        *report.summary(figures),
    ]
    return lines, {"plan": figures.as_json(), "measured_step_s": measured.step_s}


def scenario_of(config: GrpoConfig, measured: Any, num_steps: int, seed: int = 0) -> Scenario:
    """A run of `config` on the machine whose rates were `measured`."""
    return Scenario(
        num_steps=num_steps,
        groups_per_step=config.groups_per_step,
        group_size=config.group_size,
        max_staleness=config.max_staleness,
        num_engines=config.num_engines,
        gpus_per_engine=config.engine.tensor_parallel_size,
        max_num_seqs=config.engine.max_num_seqs,
        learner_ranks=config.learner.num_ranks,
        lengths=measured.lengths,
        prompt_tokens=measured.prompt_tokens,
        rates=measured.rates,
        num_reward_workers=config.num_reward_workers,
        lease_timeout_s=config.lease_timeout_s,
        checkpoint_every=config.checkpoint_every,
        seed=seed,
    )
