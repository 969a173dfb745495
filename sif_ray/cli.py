"""The jobs of sif_ray: `sif-ray JOB ...` and `python jobs/JOB.py ...` are the same thing.

Exit status: 0 done, 1 the work failed, 2 the request was wrong (configuration or input), 130 interrupted after a clean
stop. A job's module is imported only when it runs, so that help, `--dry-run` and refusals need no torch, Ray or vLLM.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import FrameType

from sif_ray import config as configuration
from sif_ray.config import ConfigError, GenerateConfig, GrpoConfig, QuickstartConfig, StageConfig, WarmupConfig
from sif_ray.observe.logs import configure_logging
from sif_ray.quickstart import with_paths
from sif_ray.resources.plan import describe, make_plan

log = logging.getLogger(__name__)

DONE, FAILED, WRONG_REQUEST, INTERRUPTED = 0, 1, 2, 130
STATUSES = "exit status: 0 done, 1 the work failed, 2 the request was wrong, 130 interrupted after a clean stop"


@dataclass(frozen=True)
class Job:
    """One stage of the work: `module` has `run(config)`, which returns nothing or raises."""

    module: str
    summary: str
    override: str  # an example for --help


@dataclass(frozen=True)
class Tool:
    """A job with plain arguments: `module` has `add_arguments(parser)` and `run(options)`, which returns an exit status
    or nothing, or raises. Its help imports the module, which therefore imports nothing heavy at its top."""

    module: str
    summary: str
    examples: tuple[str, ...]  # arguments, for --help
    passes_on: bool = False  # its last arguments are another command's, options included


JOBS = {
    "quickstart": Job("sif_ray.quickstart", "walk through every stage with tiny models", "run_dir=runs/second"),
    "generate": Job("sif_ray.datagen.stage", "make a SIF dataset from annotated images", "output=data/mine"),
    "warmup": Job("sif_ray.learner.warmup", "teach a policy the SIF format by supervised training", "output=runs/sft"),
    "grpo": Job("sif_ray.loop.stage", "improve a policy by GRPO-SIF", "output=runs/grpo"),
    "evaluate": Job("sif_ray.evaluate.stage", "measure checkpoints on held-out scenes", "output=runs/evaluation"),
    "serve": Job("sif_ray.serve.stage", "answer questions over HTTP with a trained policy", "port=8100"),
}

TOOLS = {
    "data convert": Tool(
        "sif_ray.datagen.convert",
        "annotations in any supported format to one JSON object per line",
        ("--source viscot --input viscot_363k.json --images photos --output annotations.jsonl",),
    ),
    "data inspect": Tool(
        "sif_ray.datagen.inspection",
        "show a dataset, finished or not, as one HTML page",
        ("runs/data", "s3://bucket/sif --output sif.html --open no"),
    ),
    "data export": Tool(
        "sif_ray.datagen.published",
        "write the images that a dataset's published.json names, for LLaMA-Factory",
        ("runs/data", "s3://bucket/sif --output LLaMA-Factory/data/sif"),
    ),
    "data import": Tool(
        "sif_ray.datagen.llama_factory",
        "make a dataset of traces in LLaMA-Factory's ShareGPT layout",
        ("LLaMA-Factory/data/sif/published.json --output runs/data",),
    ),
    "report": Tool(
        "sif_ray.observe.report",
        "show a run so far as one HTML page: curves, who was busy when, completions",
        ("runs/grpo", "runs/quickstart --output report.html --open no"),
    ),
    "export": Tool(
        "sif_ray.policy.export",
        "write a trained policy as a Hugging Face checkpoint or as an adapter",
        (
            "runs/grpo/checkpoint --output checkpoints/sif-7b",
            "runs/warmup/checkpoints/step-000200 --output checkpoints/sif-lora --adapter",
        ),
    ),
    "eval list": Tool(
        "sif_ray.evaluate.catalogue", "say which benchmarks there are and where their files come from", ("vstar",)
    ),
    "eval score": Tool(
        "sif_ray.evaluate.score",
        "score saved outputs, strictly and as published",
        ("--benchmark vstar --annotations test_questions.jsonl --predictions outputs.jsonl --json scores.json",),
    ),
    "eval compare": Tool(
        "sif_ray.evaluate.compare",
        "compare the saved outputs of two policies",
        ("--benchmark sat --annotations val.parquet --predictions b.jsonl --baseline a.jsonl --json difference.json",),
    ),
    "submit": Tool(
        "sif_ray.submit",
        "run a job on a Ray cluster, show its log and return its exit status",
        (
            "--address http://127.0.0.1:8265 generate --config configs/generate.yaml",
            "--run-id first grpo --config configs/grpo.yaml max_steps=100",
        ),
        passes_on=True,
    ),
    "cluster render": Tool(
        "sif_ray.cluster.render",
        "write manifests for KubeRay from the configurations of the stages",
        (
            "--config configs/cluster/production.yaml --output manifests namespace=sif-2",
            "--config configs/published/7b-split.yaml --stage grpo --output manifests",
        ),
    ),
    "cluster check": Tool(
        "sif_ray.cluster.check",
        "say what is wrong with manifests, before a cluster sees them",
        ("cluster/kuberay", "manifests/jobs/grpo.yaml --crds kuberay/ray-operator/config/crd/bases"),
    ),
    "doctor": Tool(
        "sif_ray.doctor.tool",
        "say what is wrong with machine, cluster or request before hours are spent",
        ("--json findings.json", "grpo --config configs/grpo.yaml"),
    ),
    "plan": Tool(
        "sif_ray.plan.command",
        "say how many GPUs a run should have, and how fast it would be, by simulating it",
        (
            "--config configs/published/7b-split.yaml --gpu h100 --gpus 64 --mtbf-h 50000",
            "--from-run runs/grpo max_staleness=0",
        ),
    ),
    "chaos simulate": Tool(
        "sif_ray.chaos.simulate",
        "try the control plane of GRPO on virtual time, with everything around it failing",
        ("--seeds 10000 --json simulation.json",),
    ),
    "chaos strike": Tool(
        "sif_ray.chaos.strike",
        "end, stop and damage parts of real runs on this machine, and see that they keep their promises",
        ("engine-killed driver-killed", "--times 5 --json strikes.json"),
    ),
    "chaos soak": Tool(
        "sif_ray.chaos.soak",
        "train and serve under load for an hour while parts fail at random, and see that nothing grows by 5 %",
        ("--minutes 60 --json soak.json",),
    ),
    "chaos replay": Tool("sif_ray.chaos.replay", "run one simulated seed again, with its log", ("4711",)),
    "bench": Tool(
        "sif_ray.bench",
        "measure a part of the system on this machine",
        ("rollout --json rollout.json", "learner --repetitions 5 --json learner.json"),
    ),
}
"""A name of two words is a member of a family."""


def main(argv: Sequence[str] | None = None) -> int:
    """The console command `sif-ray`: the first argument names the job, or a family and the second the job in it."""
    return run_job("", argv)


def run_job(name: str, argv: Sequence[str] | None = None) -> int:
    """Run one job with its own arguments (None = the process's) and return its exit status.

    Where `name` is a family, the first argument names the job in it; "" is the family of all.
    """
    try:
        while name not in JOBS and name not in TOOLS:
            name, argv = choose(name, argv)
        parser = (tool_parser if name in TOOLS else job_parser)(name)
        passes_on = name in TOOLS and TOOLS[name].passes_on
        options = parser.parse_args(argv) if passes_on else parser.parse_intermixed_args(argv)
    except SystemExit as stop:  # argparse has said what is wrong, or printed the help
        return int(stop.code or DONE)
    configure_logging()
    try:
        with sigterm_interrupts():
            return execute(name, options) or DONE
    except ConfigError as error:
        print(f"sif-ray {name}: {error}", file=sys.stderr)
        return WRONG_REQUEST
    except KeyboardInterrupt:
        log.warning("interrupted; what was finished is kept")
        return INTERRUPTED
    except Exception:  # the outermost frame: any other failure is told whole and becomes status 1
        log.exception("sif-ray %s failed", name)
        return FAILED


def execute(name: str, options: argparse.Namespace) -> int | None:
    """Do what was asked; None = done. Raises what the job raises."""
    if name in TOOLS:
        status: int | None = importlib.import_module(TOOLS[name].module).run(options)
        return status
    config = configuration.load(name, options.config, options.overrides)
    if options.dry_run:
        print("\n\n".join([configuration.to_yaml(config).rstrip(), configuration.describe(config), *plans(config)]))
    else:
        importlib.import_module(JOBS[name].module).run(config)
    return None


def plans(config: StageConfig) -> Iterator[str]:
    """What a dry run prints below the settings. Raises `ConfigError` for a plan that cannot work."""
    if isinstance(config, GenerateConfig):
        from sif_ray.datagen.preview import preview

        yield preview(config)
    if isinstance(config, WarmupConfig):
        from sif_ray.learner.plan import describe as describe_warmup

        yield describe_warmup(config)
    if isinstance(config, QuickstartConfig):
        config = replace(with_paths(config).grpo, policy=config.warmup.policy)  # of the same shape, and there already
    if isinstance(config, GrpoConfig):
        yield describe(config, make_plan(config))


def choose(family: str, argv: Sequence[str] | None) -> tuple[str, list[str]]:
    """The job, or the family in `family`, that the first argument names, and the arguments after it."""
    prefix = f"{family} " if family else ""
    jobs = {name.removeprefix(prefix): job.summary for name, job in (JOBS | TOOLS).items() if name.startswith(prefix)}
    parser = argparse.ArgumentParser(
        prog=f"sif-ray {family}".rstrip(),
        usage=f"sif-ray {prefix}JOB [argument ...]   (sif-ray {prefix}JOB --help tells which)",
        description=__doc__,
        epilog="jobs:\n" + "\n".join(f"  {name:<13} {summary}" for name, summary in jobs.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    first_words = list(dict.fromkeys(name.split()[0] for name in jobs))
    parser.add_argument("job", metavar="JOB", choices=first_words, help="one of the jobs below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    return prefix + options.job, options.arguments


def job_parser(name: str) -> argparse.ArgumentParser:
    """The command line of a job with a configuration."""
    file = f"--config configs/{name}.yaml"
    parser = _parser(name, JOBS[name].summary, (file, f"{file} {JOBS[name].override} --dry-run"))
    parser.add_argument("--config", metavar="FILE", help="YAML file with the job's settings (default: all defaults)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file, e.g. a.b=1")
    parser.add_argument("--dry-run", action="store_true", help="check and print the settings and the plan, run nothing")
    return parser


def tool_parser(name: str) -> argparse.ArgumentParser:
    """The command line of a tool, whose arguments its module adds."""
    parser = _parser(name, TOOLS[name].summary, TOOLS[name].examples)
    importlib.import_module(TOOLS[name].module).add_arguments(parser)
    return parser


def _parser(name: str, summary: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    script, _, member = name.partition(" ")
    lines = [f"  sif-ray {name} {arguments}\n" for arguments in examples]
    lines.append(f"  {f'python jobs/{script}.py {member}'.rstrip()} ...    the same from a checkout\n")
    return argparse.ArgumentParser(
        prog=f"sif-ray {name}",
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"examples:\n{''.join(lines)}\n{STATUSES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Inside, SIGTERM does what Ctrl-C does, so that `finally` blocks stop what was started. Main thread only."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        handler = signal.getsignal(signal.SIGINT)  # asyncio's, where an event loop runs
        (handler if callable(handler) else signal.default_int_handler)(signal.SIGINT, frame)

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
