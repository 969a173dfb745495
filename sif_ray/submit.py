"""`sif-ray submit`: a job on a Ray cluster, with its log here and its exit status as this command's.

    sif-ray submit grpo --config F     ──► Jobs API of the cluster ──► `python jobs/grpo.py --config F` beside its head
       │  checks the request first          │
       │  shows the log as it is written ◄──┘  Ctrl-C or SIGTERM: the job is told to stop, saves and ends
       └─ ends with the job's exit status

It is `ray job submit` with three things more: a request that cannot work is refused before it is sent, the job has
time to save when it is stopped, and its own exit status comes back.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_fixed

from sif_ray import cli, config
from sif_ray.config import ConfigError
from sif_ray.runtime import WORKER_ENVIRONMENT
from sif_ray.secret_names import looks_secret

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 300  # for a job to save after SIGTERM; then Ray kills it
STARTS_S = 180.0  # a cluster may take so long until it takes jobs
UNREACHABLE_S = 600.0  # the cluster may not answer for so long, as while its head is replaced
RETRY_S = 2.0

NOT_UPLOADED = [".git", ".venv", "artefacts", "runs"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "sif-ray submit [option ...] JOB [argument of the job ...]"
    parser.add_argument(
        "--address", help="http://HOST:8265 of the cluster (default: RAY_ADDRESS, else one of this machine)"
    )
    parser.add_argument(
        "--working-dir",
        default=".",
        metavar="DIR",
        help='checkout that is sent along (default: this folder); "" = the job\'s machines have it in their image',
    )
    parser.add_argument("--run-id", metavar="NAME", help="name of the run (default: JOB and the time); again = resume")
    parser.add_argument("--runtime-env", metavar="FILE", help="YAML of Ray's runtime environment")
    parser.add_argument("--num-cpus", type=float, default=0.0, help="of the job's process (default: 0, on the head)")
    parser.add_argument("--no-wait", action="store_true", help="return when the job is sent")
    parser.add_argument("job", metavar="JOB", choices=_names(), help="grpo, evaluate, data, ...")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the job's own command line takes")


def run(options: argparse.Namespace) -> int:
    """Send the job, follow it, and return its exit status. Raises `ConfigError` for a wrong request."""
    _check(options)
    environment = _runtime_env(options)
    run_id = options.run_id or f"{options.job}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not re.fullmatch(r"[\w.-]+", run_id):
        raise ConfigError(f"--run-id = {run_id!r}: use letters, digits and . _ -")
    client = _connect(options.address)
    job = _starting_retried(client.submit_job)(
        entrypoint=shlex.join(["python", f"jobs/{options.job}.py", *options.arguments]),
        submission_id=f"{run_id}-{_attempts(client, run_id) + 1}",
        runtime_env=environment,
        metadata={"project": "sif_ray", "run_id": run_id},
        entrypoint_num_cpus=options.num_cpus,
    )
    log.info("submitted as %s", job)
    if options.no_wait:
        return cli.DONE
    follower = _Follower(client, job)
    try:
        asyncio.run(follower.until_end())
    except KeyboardInterrupt:
        log.warning("%s is told to stop; it may save for up to %d s", job, STOP_TIMEOUT_S)
        client.stop_job(job)
        asyncio.run(follower.until_end())
    return exit_status(client.get_job_info(job))


# --- the request -----------------------------------------------------------------------------------------------------


def _names() -> list[str]:
    names = dict.fromkeys(name.split()[0] for name in (*cli.JOBS, *cli.TOOLS))
    return [name for name in names if name != "submit"]


def _check(options: argparse.Namespace) -> None:
    """Refuse here what the job would refuse there. A configuration that only the image has is not seen."""
    script = Path(options.working_dir, "jobs", f"{options.job}.py")
    if options.working_dir and not script.is_file():
        raise ConfigError(
            f"--working-dir = {options.working_dir!r}: there is no {script}; name a checkout of sif_ray, or set it to "
            '"" where the image of the cluster holds one'
        )
    if options.job not in cli.JOBS:
        return
    try:
        asked = cli.job_parser(options.job).parse_intermixed_args(options.arguments)
    except SystemExit as stop:  # argparse has said what is wrong
        raise ConfigError(f"the arguments of {options.job} are wrong") from stop
    file = Path(options.working_dir, asked.config) if asked.config else None
    if file is None or file.is_file() or options.working_dir:
        config.load(options.job, str(file) if file else None, asked.overrides)
    if file and options.working_dir and not file.resolve().is_relative_to(Path(options.working_dir).resolve()):
        raise ConfigError(f"--config = {asked.config!r} lies outside --working-dir and is not sent along; move it in")


def _runtime_env(options: argparse.Namespace) -> dict[str, Any]:
    """Of the job and of every worker that it starts. The dashboard shows it, so it may hold no secret."""
    given = yaml.safe_load(Path(options.runtime_env).read_text()) if options.runtime_env else {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"--runtime-env = {options.runtime_env!r}: the file is not a mapping")
    variables = dict(given.get("env_vars") or {})
    for name in variables:
        if looks_secret(name):
            raise ConfigError(
                f"--runtime-env: env_vars.{name} looks like a secret, and whoever sees the dashboard reads it; set the "
                "variable on the machines of the cluster (a Secret in Kubernetes) and name it in the configuration"
            )
    variables = WORKER_ENVIRONMENT | {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_TIMEOUT_S)} | variables
    environment = dict(given) | {"env_vars": variables}
    if options.working_dir:
        environment |= {"working_dir": options.working_dir, "excludes": [*NOT_UPLOADED, *given.get("excludes", [])]}
    return environment


# --- the cluster -----------------------------------------------------------------------------------------------------


def _connect(address: str | None) -> Any:
    """A client of the Jobs API. Its token is Ray's: RAY_AUTH_MODE and RAY_AUTH_TOKEN, or ~/.ray/auth_token."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.WARNING)  # every file that is not sent, twice
    try:
        return JobSubmissionClient(address)
    except (AuthenticationError, ConnectionError, RuntimeError) as error:
        raise ConfigError(
            f"--address = {address or 'the cluster of this machine'!r}: {error}; give http://HOST:8265 of a cluster "
            "that runs, and its token in RAY_AUTH_TOKEN with RAY_AUTH_MODE=token"
        ) from error


def _attempts(client: Any, run_id: str) -> int:
    """How often this run was submitted before. Raises `ConfigError` while it is running."""
    before = [job for job in client.list_jobs() if (job.metadata or {}).get("run_id") == run_id]
    for job in before:
        if not job.status.is_terminal():
            raise ConfigError(
                f"--run-id = {run_id!r} is running as {job.submission_id}: two jobs would write into one folder; wait, "
                f"or end it with `ray job stop {job.submission_id}`"
            )
    return len(before)


def _starting_retried(submit_job: Callable[..., str]) -> Callable[..., str]:
    """The same for a cluster whose head answers before a node can take jobs."""
    starting = retry_if_exception(lambda error: "No available agent" in str(error))
    retrying = Retrying(retry=starting, stop=stop_after_delay(STARTS_S), wait=wait_fixed(RETRY_S), reraise=True)
    return retrying.wraps(submit_job)


@dataclass
class _Follower:
    """Shows a job's log, every character once."""

    client: Any
    job: str
    shown: int = 0

    async def until_end(self) -> None:
        """A cluster that does not answer is asked again; after `UNREACHABLE_S` in a row the error is raised."""
        import aiohttp
        import requests

        answered_s = time.monotonic()
        while True:
            try:
                await self._show()
                if self.client.get_job_status(self.job).is_terminal():
                    return
                answered_s = time.monotonic()
            except (aiohttp.ClientError, requests.RequestException, RuntimeError) as error:
                if time.monotonic() - answered_s > UNREACHABLE_S:
                    raise
                log.warning("the cluster does not answer (%s); asking again", error)
            await asyncio.sleep(RETRY_S)

    async def _show(self) -> None:
        """From its first character, as the server sends it."""
        position = 0
        async for text in self.client.tail_job_logs(self.job):
            sys.stdout.write(text[max(0, self.shown - position) :])
            sys.stdout.flush()
            position += len(text)
            self.shown = max(self.shown, position)


def exit_status(job: Any) -> int:
    """The exit status of a job that has ended, as a shell gives it."""
    message = str(job.message).partition(", last available logs")[0]  # they have been shown
    log.log(logging.INFO if job.status == "SUCCEEDED" else logging.ERROR, "%s: %s", job.status.lower(), message)
    if job.status == "STOPPED":
        return cli.INTERRUPTED
    code = job.driver_exit_code
    if code is None:  # it never ran, or its machine was lost
        return cli.FAILED if job.status != "SUCCEEDED" else cli.DONE
    return int(code) if code >= 0 else 128 - code
