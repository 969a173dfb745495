"""Requests in the gateway's log and at Ray's metrics endpoint."""

from __future__ import annotations

import logging
from dataclasses import asdict

from ray.serve.metrics import Counter, Histogram

from sif_ray.serve.record import RequestRecord

log = logging.getLogger("ray.serve")  # what Ray Serve writes as JSON, with the fields of `extra`

SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]


class Meter:
    """Ray puts `ray_` before the names and adds deployment, replica and application to the labels.

    Example: `Meter()(record)` counts a request and writes its line.
    """

    def __init__(self) -> None:
        self._requests = Counter("sif_ray_requests", "requests by route and status", ("route", "status"))
        self._seconds = Histogram("sif_ray_request_seconds", "whole request", SECONDS, ("route",))
        self._parts = Histogram(
            "sif_ray_request_part_seconds", "depth, first_token, generate, engine", SECONDS, ("part",)
        )
        self._tokens = Counter("sif_ray_served_tokens", "tokens by kind: prompt, written", ("kind",))
        self._traces = Counter("sif_ray_traces", "outputs by validity: true, false", ("valid",))

    def __call__(self, record: RequestRecord) -> None:
        self._requests.inc(1, {"route": record.route, "status": str(record.status)})
        self._seconds.observe(record.seconds, {"route": record.route})
        parts = {
            "depth": record.depth_s,
            "first_token": record.first_token_s,
            "generate": record.generate_s,
            "engine": record.engine_s,
        }
        for part, seconds in parts.items():
            if seconds is not None:
                self._parts.observe(seconds, {"part": part})
        for kind, count in {"prompt": record.prompt_tokens, "written": record.tokens}.items():
            if count:
                self._tokens.inc(count, {"kind": kind})
        if record.valid is not None:
            self._traces.inc(1, {"valid": str(record.valid).lower()})
        log.info("request", extra=asdict(record))
