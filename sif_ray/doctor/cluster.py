"""A Ray cluster that a run joins: whether it can be joined, and then all of its nodes (`cluster_process`)."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping

from sif_ray.doctor.child import ChildError, run_module
from sif_ray.doctor.endpoints import unreachable
from sif_ray.doctor.finding import Finding, fault, note
from sif_ray.doctor.need import Need

PROCESS = "sif_ray.doctor.cluster_process"
LIMIT_S = 240.0
CONNECT_S = 5.0

_CHECK = "Ray cluster"
_TOKEN = (
    "give this process the cluster's token: RAY_AUTH_MODE=token with RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH "
    "(ray get-auth-token shows where it is kept)"
)
_REFUSALS = {
    "Version mismatch": "install the cluster's versions of Ray and Python here (or this one's there)",
    "InvalidAuthToken": _TOKEN,
    "AuthenticationError": _TOKEN,
    "Could not find any running Ray instance": "start one, or name it: ray.address=host:port or RAY_ADDRESS",
}
"""What may be done, by a part of Ray's message."""


def cluster_findings(need: Need, limit_s: float = LIMIT_S) -> Iterator[Finding]:
    """All about the cluster at `need.address` and about each of its nodes."""
    if why := _closed(need.address):
        yield fault(_CHECK, f"{need.address}: {why}", "start it, or correct ray.address (host:6379 as a rule)")
        return
    try:
        yield from pickle.loads(run_module(PROCESS, pickle.dumps((need.address, need)), timeout_s=limit_s))
    except TimeoutError as error:
        fix = "see whether the cluster is healthy (ray status) and answers other jobs"
        yield fault(_CHECK, f"{need.address}: {error}", fix)
    except ChildError as error:
        yield _refusal(need.address, str(error))


def job_findings(need: Need, environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """A run inside a job of a cluster that would not use it."""
    if need.is_local and environ.get("RAY_ADDRESS"):
        yield note(
            "ray.address",
            "'local', but this process belongs to a cluster (RAY_ADDRESS): a run would start one of its own here",
            "leave ray.address out",
        )


def _closed(address: str) -> str:
    """Why an address `host:port` cannot be reached, "" where it can or is of another form."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    return unreachable(host, int(port), CONNECT_S) if host and port.isdigit() else ""


def _refusal(address: str, message: str) -> Finding:
    """The fault behind what Ray wrote when it could not join."""
    lines = [line.strip() for line in message.strip().splitlines()]
    for part, fix in _REFUSALS.items():
        if told := [line for line in lines if part in line]:
            return fault(_CHECK, f"{address}: {told[-1][:200]}", fix)
    return fault(_CHECK, f"{address}: {lines[-1][:200]}", "see that it runs: ray status")
