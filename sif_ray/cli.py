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
from sif_ray.config import ConfigError, GrpoConfig, QuickstartConfig, StageConfig
from sif_ray.quickstart import with_paths
from sif_ray.resources.plan import describe, make_plan

log = logging.getLogger(__name__)

DONE, FAILED, WRONG_REQUEST, INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True)
class Job:
    """One stage of the work: `module` has `run(config)`, which returns nothing or raises."""

    module: str
    summary: str
    override: str  # an example for --help


JOBS = {
    "quickstart": Job("sif_ray.quickstart", "walk through every stage with tiny models", "run_dir=runs/second"),
    "generate": Job("sif_ray.datagen.stage", "make a SIF dataset from annotated images", "output=data/mine"),
    "warmup": Job("sif_ray.learner.warmup", "teach a policy the SIF format by supervised training", "output=runs/sft"),
    "grpo": Job("sif_ray.loop.stage", "improve a policy by GRPO-SIF", "output=runs/grpo"),
    "evaluate": Job("sif_ray.evaluate.stage", "measure checkpoints on held-out scenes", "output=runs/evaluation"),
    "serve": Job("sif_ray.serve.stage", "answer questions over HTTP with a trained policy", "port=8100"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The console command `sif-ray`: the first argument names the job, the rest is the job's."""
    parser = argparse.ArgumentParser(
        prog="sif-ray",
        usage="sif-ray JOB [--config FILE] [key=value ...] [--dry-run]",
        description=__doc__,
        epilog="jobs:\n" + "\n".join(f"  {name:<11} {job.summary}" for name, job in JOBS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("job", metavar="JOB", choices=JOBS, help="one of the jobs below; JOB --help tells more")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    try:
        options = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or DONE)
    return run_job(options.job, options.arguments)


def run_job(name: str, argv: Sequence[str] | None = None) -> int:
    """Run one job with its own arguments (None = the process's) and return its exit status."""
    try:
        options = job_parser(name).parse_intermixed_args(argv)
    except SystemExit as stop:  # argparse has said what is wrong, or printed the help
        return int(stop.code or DONE)
    configure_logging()
    try:
        config = configuration.load(name, options.config, options.overrides)
        if options.dry_run:
            print("\n\n".join([configuration.to_yaml(config).rstrip(), configuration.describe(config), *plans(config)]))
            return DONE
        with sigterm_interrupts():
            importlib.import_module(JOBS[name].module).run(config)
    except ConfigError as error:
        print(f"sif-ray {name}: {error}", file=sys.stderr)
        return WRONG_REQUEST
    except KeyboardInterrupt:
        log.warning("interrupted; what was finished is kept")
        return INTERRUPTED
    except Exception:  # the outermost frame: any other failure is told whole and becomes status 1
        log.exception("sif-ray %s failed", name)
        return FAILED
    return DONE


def plans(config: StageConfig) -> Iterator[str]:
    """What a dry run prints below the settings. Raises `ConfigError` for a plan that cannot work."""
    if isinstance(config, QuickstartConfig):
        config = replace(with_paths(config).grpo, policy=config.warmup.policy)  # of the same shape, and there already
    if isinstance(config, GrpoConfig):
        yield describe(config, make_plan(config))


def job_parser(name: str) -> argparse.ArgumentParser:
    """The command line that all jobs share."""
    job = JOBS[name]
    parser = argparse.ArgumentParser(
        prog=f"sif-ray {name}",
        description=f"{job.summary[0].upper()}{job.summary[1:]}.",
        epilog=(
            "examples:\n"
            f"  sif-ray {name} --config configs/{name}.yaml\n"
            f"  sif-ray {name} --config configs/{name}.yaml {job.override} --dry-run\n"
            f"  python jobs/{name}.py ...                  the same from a checkout\n\n"
            "exit status: 0 done, 1 the work failed, 2 the request was wrong, 130 interrupted after a clean stop"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with the job's settings (default: all defaults)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file, e.g. a.b=1")
    parser.add_argument("--dry-run", action="store_true", help="check and print the settings and the plan, run nothing")
    return parser


def configure_logging() -> None:
    """Our INFO and everybody's WARNING on stderr: coloured on a terminal, plain lines elsewhere."""
    handler: logging.Handler
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler = RichHandler(console=Console(stderr=True), show_path=False, log_time_format="%H:%M:%S")
        logging.basicConfig(format="%(message)s", handlers=[handler], level=logging.WARNING)
    else:
        handler = logging.StreamHandler()
        logging.basicConfig(
            format="%(asctime)s %(levelname)s %(name)s: %(message)s", handlers=[handler], level=logging.WARNING
        )
    logging.getLogger("sif_ray").setLevel(logging.INFO)


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
