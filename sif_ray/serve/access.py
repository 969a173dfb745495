"""Who may ask, how often, and how many at a time. Every refusal comes before a body is read."""

from __future__ import annotations

import hmac
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import limits
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from sif_ray.config import ConfigError, ServeConfig
from sif_ray.serve.refusal import RequestRefused

ANYBODY = "anybody"
"""The caller where no keys are configured: everybody shares one rate."""

RETRY_FULL_S = 1  # a place among hundreds is free soon


class Keys:
    """Bearer keys by the name of their holder, which is all that messages show.

    Example: `Keys({"alice": "sk-1", "ci": "sk-2"}).holder("Bearer sk-2")` is "ci".
    """

    def __init__(self, keys: Mapping[str, str]) -> None:
        self._keys = {name: key.encode() for name, key in keys.items()}

    def __bool__(self) -> bool:
        return bool(self._keys)

    @classmethod
    def read(cls, config: ServeConfig) -> Keys:
        """The keys that a configuration names: lines of `holder: key` in a file or in an environment variable.

        Raises `ConfigError`; keys are never part of a message.
        """
        found: dict[str, str] = {}
        if config.api_keys_file:
            try:
                text = Path(config.api_keys_file).read_text()
            except OSError as error:
                raise ConfigError(f"api_keys_file = {config.api_keys_file!r}: cannot be read: {error}") from error
            found |= _parse(text, f"api_keys_file = {config.api_keys_file!r}")
        if config.api_keys_env:
            where = f"api_keys_env = {config.api_keys_env!r}"
            if config.api_keys_env not in os.environ:
                raise ConfigError(f"{where}: this environment variable is not set; put lines of `holder: key` into it")
            found |= _parse(os.environ[config.api_keys_env], where)
        return cls(found)

    def holder(self, authorization: str) -> str:
        """Who sends this header. Raises `RequestRefused` (401). Takes the same time for every wrong key."""
        if not self._keys:
            return ANYBODY
        scheme, _, sent = authorization.partition(" ")
        matches = [name for name, key in self._keys.items() if hmac.compare_digest(key, sent.strip().encode())]
        if scheme.lower() != "bearer" or not matches:
            what = "the API key is not known" if authorization else "no API key was sent"
            raise RequestRefused(
                401, f"{what}; send the header 'Authorization: Bearer KEY'", {"WWW-Authenticate": "Bearer"}
            )
        return matches[0]


def _parse(text: str, where: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        holder, colon, key = (part.strip() for part in line.partition(":"))
        if not (holder and colon and key):
            raise ConfigError(f"{where}: line {number} is not `holder: key`")
        if not key.isascii():
            raise ConfigError(f"{where}: line {number}: the key has characters beyond ASCII, which no header can carry")
        if holder in found:
            raise ConfigError(f"{where}: line {number} names {holder!r} again; give every key a holder of its own")
        found[holder] = key
    if not found:
        raise ConfigError(f"{where}: holds no key; write lines of `holder: key`")
    return found


class Rate:
    """How often each holder may ask, in a moving window. Every gateway replica counts for itself."""

    def __init__(self, rate: str) -> None:
        """`rate` as "60/minute" or "5/second"; "" = no limit."""
        self._limit = limits.parse(rate) if rate else None
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def take(self, holder: str) -> None:
        """One request of a holder. Raises `RequestRefused` (429) that says when there is room again."""
        if self._limit is None or self._limiter.hit(self._limit, holder):
            return
        reset_s = self._limiter.get_window_stats(self._limit, holder).reset_time - time.time()
        wait_s = max(1, math.ceil(reset_s))
        raise RequestRefused(
            429, f"{holder}: more than {self._limit}; ask again in {wait_s} s", {"Retry-After": str(wait_s)}
        )


class Places:
    """How many requests may be inside at once, waiting ones included."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.taken = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """One of them for the body. Raises `RequestRefused` (503) when all are taken."""
        if self.taken >= self._count:
            raise RequestRefused(
                503, f"{self._count} requests are under way; ask again", {"Retry-After": str(RETRY_FULL_S)}
            )
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1
