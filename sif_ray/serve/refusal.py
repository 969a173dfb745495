"""What a client is told instead of an answer."""

from __future__ import annotations

from collections.abc import Mapping


class RequestRefused(ValueError):
    """The request is wrong: `status` is the HTTP status, the message names the field, the value and the way out."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
