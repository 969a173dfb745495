"""What a client is told instead of an answer."""

from __future__ import annotations

from collections.abc import Mapping

from sif_ray.serve.protocol import Problem, Refusal

_MESSAGE_END_CHARS = 500  # what was sent is part of some messages, and may be long
_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error", 504: "server_error"}


class RequestRefused(ValueError):
    """The request is wrong: `status` is the HTTP status, the message names the field, the value and the way out."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


def refusal(status: int, message: str) -> Refusal:
    """The body of a response of this status."""
    if len(message) > 2 * _MESSAGE_END_CHARS:
        message = f"{message[:_MESSAGE_END_CHARS]} ... {message[-_MESSAGE_END_CHARS:]}"
    return Refusal(error=Problem(message=message, type=_TYPES.get(status, "invalid_request_error")))
