"""Calls of a chat model that take what a busy or broken endpoint does to them. Judge and teacher make theirs here.

    call ─► breaker ─► limits ─► server ─► what is read in the reply
               ▲                    │
               └── retry, jitter ◄──┘  time-out, 429, 5xx, broken or unreadable reply

An outage is never laid at a call's door: while the breaker is open a ping alone is sent, something that the model can
always answer; a call gives up only after the model has answered somebody between its first attempt and its last; and a
model that asks for patience (429) is waited for, which is none of a call's retries. So an outage shorter than
`max_wait_s` costs nothing but time.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from sif_ray.clock import now_s
from sif_ray.config import EndpointConfig
from sif_ray.judge.breaker import Attempt, Breaker
from sif_ray.judge.client import RATE_LIMIT, CallError, CallRefused, ChatClient, Completion, EndpointDown
from sif_ray.judge.limits import Limits
from sif_ray.judge.meter import Meter
from sif_ray.observe import jsonl

FIRST_PAUSE_S = 0.5  # before a retry: random, at most this, doubled with every further retry
LONGEST_PAUSE_S = 20.0

T = TypeVar("T")


@dataclass(frozen=True)
class Call(Generic[T]):
    """Something to be asked, and how its reply is read."""

    request: Callable[[], Mapping[str, Any]]  # keyword arguments of a chat completion, made anew for every attempt
    read: Callable[[Completion], T]  # raises `CallError` where the reply does not hold what was asked for
    note: Mapping[str, Any]  # what the audit log says of it: no images
    result: str = ""  # name of what was read in the audit log; "" = it is not written


class Client(Protocol):
    """`sif_ray.judge.client.ChatClient`, or what stands in for it."""

    async def complete(self, request: Mapping[str, Any]) -> Completion: ...

    async def close(self) -> None: ...


class Caller:
    """One worker's calls of one endpoint. For one event loop."""

    def __init__(
        self,
        name: str,
        config: EndpointConfig,
        api_key: str,
        audit: Path,
        num_workers: int,
        ping: Call[Any],
        client: Client | None = None,
    ) -> None:
        """Append every attempt to the file `audit`. `name`, e.g. "judge", is that of log lines and metrics.

        Of the limits of `config` this worker takes its share, one in `num_workers`, who may not be more than
        `max_concurrency`. `api_key` = "": none. `client` takes the place of the endpoint that `config` names.
        """
        self._name = name
        self._config = config
        self._client: Client = client or ChatClient(config.base_url, api_key, config.timeout_s)
        self._limits = Limits(config.max_concurrency // num_workers, config.requests_per_minute / num_workers)
        # Failures in a row open the breaker before a call of its own has used up its retries.
        self._max_retries = max(1, config.max_retries)
        failures = min(config.breaker_failures, self._max_retries + 1)
        self._breaker = Breaker(name, failures, config.breaker_cooldown_s)
        self._audit = jsonl.open_for_append(audit)
        self._ping = ping
        self._answered_s = 0.0  # when any call was last answered
        self.meter = Meter(name, config.usd_per_million_tokens)

    async def call(self, call: Call[T]) -> T:
        """What is read in the reply to `call`.

        Raises `CallRefused` when the server works and will not answer this call; `EndpointDown` when it has not
        answered anybody for `max_wait_s`; another `CallError` when retries are of no use or used up.
        """
        asked_s, numbers = now_s(), itertools.count(1)

        async def attempt() -> T:
            return await self._attempt(call, next(numbers), asked_s)

        return await retrying(self._max_retries)(attempt)

    def metrics(self) -> dict[str, float]:
        """Totals of this worker: <name>/calls, /retries, /error/<reason>, /breaker_opened, /tokens_in, /tokens_out,
        /usd, /latency_mean_s, /latency_p95_s, and what else was counted with `meter`."""
        return self.meter.metrics() | {f"{self._name}/breaker_opened": float(self._breaker.times_opened)}

    async def close(self) -> None:
        """Close connections and log."""
        await self._client.close()
        self._audit.close()

    async def _attempt(self, call: Call[T], number: int, asked_s: float) -> T:
        """Ask as soon as breaker and limits allow it, and until the model is not down."""
        while True:
            if not await self._breaker.wait(self._left_s(asked_s)):
                raise EndpointDown(f"{self._name} is down")
            async with self._limits.slot():
                attempt = self._breaker.enter()
                if attempt is None:
                    continue
                if self._breaker.is_open:
                    await self._probe(asked_s, attempt)
                    continue
                try:
                    return await self._ask(call, number, asked_s, attempt)
                except CallError as error:
                    busy = error.reason == RATE_LIMIT
                    if error.retry and (error.down or busy) and self._left_s(asked_s) <= 0:
                        raise EndpointDown(error.reason, error.detail) from error
                    # An attempt while the model is down says nothing about this call, so it is none of its retries.
                    if not (error.retry and (self._breaker.is_open or busy)):
                        raise

    async def _probe(self, asked_s: float, attempt: Attempt) -> None:
        try:
            await self._ask(self._ping, 1, asked_s, attempt)
        except CallError as error:
            if not error.retry and not isinstance(error, CallRefused):  # a wrong key: no use in waiting
                raise

    async def _ask(self, call: Call[T], number: int, asked_s: float, attempt: Attempt) -> T:
        """Ask once, and tell everybody what came of it. The breaker hears of it through `attempt`."""
        started_s = now_s()
        completion, result, error = Completion(), None, None
        try:
            completion = await self._client.complete(call.request())
            result = call.read(completion)
        except CallError as caught:
            error = self._hold_back(caught, asked_s)
        except BaseException:
            attempt.ended(None)
            raise
        if not (error and (error.down or error.reason == RATE_LIMIT)):
            self._answered_s = now_s()
        attempt.ended(None if error and error.reason == RATE_LIMIT else not (error and error.down))
        self._note(call, number, now_s() - started_s, completion, result, error)
        if error:
            raise error
        return result  # type: ignore[return-value]  # what `read` returned

    def _hold_back(self, error: CallError, asked_s: float) -> CallError:
        """Pause all calls where the server asks for it; a longer pause than we wait for is an outage."""
        pause_s = error.retry_after_s or (self._config.breaker_cooldown_s if error.reason == RATE_LIMIT else 0.0)
        if pause_s:
            self._limits.pause(pause_s)
        if error.retry_after_s > max(0.0, self._left_s(asked_s)):
            return EndpointDown(error.reason, error.detail)
        return error

    def _left_s(self, asked_s: float) -> float:
        """Seconds that a call of the time `asked_s` still waits for a model that does not answer."""
        return max(asked_s, self._answered_s) + self._config.max_wait_s - now_s()

    def _note(
        self,
        call: Call[T],
        number: int,
        latency_s: float,
        completion: Completion,
        result: T | None,
        error: CallError | None,
    ) -> None:
        reason = error.reason if error else ""
        self.meter.attempt(number, latency_s, completion.tokens_in, completion.tokens_out, reason)
        line = {
            "time_s": time.time(),
            **call.note,
            "model": self._config.model,
            "attempt": number,
            "reply": completion.text,
            **({call.result: result} if call.result else {}),
            "error": reason,
            "detail": error.detail if error else "",
            "latency_s": latency_s,
            "tokens_in": completion.tokens_in,
            "tokens_out": completion.tokens_out,
        }
        self._audit.write(jsonl.to_line(line))


async def ask_before_a_run(config: EndpointConfig, api_key: str, call: Call[T]) -> T:
    """Ask with retries but no patience, to see whether the endpoint works. Raises `CallError`."""
    client = ChatClient(config.base_url, api_key, config.timeout_s)

    async def ask() -> T:
        return call.read(await client.complete(call.request()))

    try:
        return await retrying(config.max_retries)(ask)
    finally:
        await client.close()


def retrying(max_retries: int) -> AsyncRetrying:
    """Attempts with random, growing pauses between them, as long as the error is worth it."""
    return AsyncRetrying(
        stop=stop_after_attempt(max_retries + 1),
        wait=wait_random_exponential(multiplier=FIRST_PAUSE_S, max=LONGEST_PAUSE_S),
        retry=retry_if_exception(lambda error: isinstance(error, CallError) and error.retry),
        reraise=True,
    )
