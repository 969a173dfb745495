"""What is known of every request: sizes, times and outcome, never content. Logs and metrics are made of it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sif_ray.serve.backends import Ask, EstimateDepth, Generation, Policy, Refused

HUNG_UP = 499
"""The status of a request whose client did not wait for it, as web servers log it."""

NO_ROUTE = "none"


@dataclass
class RequestRecord:
    """One request, filled in on its way. None = it did not come so far."""

    method: str
    route: str = NO_ROUTE  # as it is declared, so that a metric's label has few values
    holder: str = ""  # of the key
    model: str = ""
    status: int = HUNG_UP  # until a response begins
    seconds: float = 0.0
    body_bytes: int = 0
    depth_s: float | None = None
    first_token_s: float | None = None  # after the policy was asked; of streams only
    generate_s: float | None = None  # until the output was whole, as the gateway sees it
    engine_s: float | None = None  # the engine's part of it; of whole replies only
    prompt_tokens: int = 0
    tokens: int = 0
    finish_reason: str | None = None
    policy_version: int | None = None
    valid: bool | None = None  # whether the output is a well-formed trace


_CURRENT: ContextVar[RequestRecord] = ContextVar("request_record")


def server_timing(record: RequestRecord) -> str:
    """The header of this name (W3C Server Timing): what is known of the parts, in milliseconds."""
    parts = {"depth": record.depth_s, "generate": record.generate_s, "engine": record.engine_s}
    return ", ".join(f"{name};dur={1000 * seconds:.1f}" for name, seconds in parts.items() if seconds is not None)


def current() -> RequestRecord:
    """The record of the request that this task works on; outside of one, a record that nobody reads."""
    return _CURRENT.get(None) or RequestRecord("")


class Recorded:
    """ASGI middleware: gives each HTTP request a record, and hands it to `observe` when the request is over."""

    def __init__(self, app: ASGIApp, observe: Callable[[RequestRecord], None]) -> None:
        self._app, self._observe = app, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(scope["method"])
        started_s = time.monotonic()

        async def received() -> Message:
            message = await receive()
            record.body_bytes += len(message.get("body", b""))
            return message

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                if timing := server_timing(record):
                    MutableHeaders(scope=message)["Server-Timing"] = timing
            await send(message)

        token = _CURRENT.set(record)
        try:
            await self._app(scope, received, sent)
        finally:
            _CURRENT.reset(token)
            record.route = getattr(scope.get("route"), "path", NO_ROUTE)
            record.seconds = time.monotonic() - started_s
            self._observe(record)


def recorded_depth(estimate: EstimateDepth) -> EstimateDepth:
    """The function with its time in the record."""

    async def estimate_recorded(photo: bytes) -> bytes:
        started_s = time.monotonic()
        depth = await estimate(photo)
        current().depth_s = time.monotonic() - started_s
        return depth

    return estimate_recorded


class RecordedPolicy:
    """A policy whose times, tokens and version stand in the record."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    async def generate(self, ask: Ask) -> Generation | Refused:
        started_s = time.monotonic()
        written = await self._policy.generate(ask)
        _note(written, started_s)
        return written

    async def stream(self, ask: Ask) -> AsyncIterator[Generation | Refused]:
        started_s = time.monotonic()
        async with aclosing(self._policy.stream(ask)) as parts:
            async for part in parts:
                if current().first_token_s is None:
                    current().first_token_s = time.monotonic() - started_s
                _note(part, started_s)
                yield part


def _note(written: Generation | Refused, started_s: float) -> None:
    if isinstance(written, Generation):
        record = current()
        record.generate_s = time.monotonic() - started_s
        record.policy_version = written.policy_version
        record.prompt_tokens = written.num_prompt_tokens
        record.tokens += written.num_tokens
        record.finish_reason = written.finish_reason
        record.engine_s = written.engine_s
