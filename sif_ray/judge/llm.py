"""A judge behind an OpenAI-compatible endpoint, as in the paper: it sees question, reference, answer and photo.

What runs the endpoint does not matter; structured output (`response_format` with a JSON schema) is asked for and not
relied upon. A judge of one's own, on the machine `judge-host`, and the part of a GRPO configuration that uses it:

    vllm serve Qwen/Qwen2.5-VL-7B-Instruct --served-model-name judge --port 8000

    judge:
      kind: llm
      model: judge
      base_url: http://judge-host:8000/v1
      max_concurrency: 64

A hosted one wants a key. It is read from the environment of every node that runs a reward worker:

    judge:
      kind: llm
      model: some-model
      base_url: https://api.example.com/v1
      api_key_env: JUDGE_API_KEY # the name of the variable
      requests_per_minute: 500
      usd_per_million_tokens: [0.4, 1.6] # for the metric judge/usd

What an answer meets on its way:

    same question already asked ─► cache ─► breaker ─► limits ─► server ─► score ─► cache
                                               ▲                    │
                                               └── retry, jitter ◄──┘  time-out, 429, 5xx, broken or unreadable reply

- Retries used up, a judge that is down for longer than `max_wait_s`, a wrong key or model: `Failed`. So is a reply that
  holds no score: the group's next answers are others, and may have one.
- A request that the server refuses for what it contains (content policy, too long): `Abstained`.
- Attempts while the breaker is open are probes, not retries of an answer: an outage shorter than `max_wait_s` costs
  nothing but time.
- What the policy wrote is not to be trusted; `sif_ray.method.prompts.judge_user` keeps it in its place.
- `judge/` in the run folder holds the cache and one audit log per worker. Every attempt is a line of it: key, prompt,
  hash of the photo, reply, score, error, seconds, tokens. The key covers the model, both messages, the photo and the
  reply's form; the system message is `sif_ray.method.prompts.judge_system`.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from sif_ray.config import ConfigError, JudgeConfig
from sif_ray.judge.breaker import Breaker
from sif_ray.judge.cache import ScoreCache
from sif_ray.judge.client import CallError, CallRefused, ChatClient, Completion
from sif_ray.judge.limits import Limits
from sif_ray.judge.meter import Meter
from sif_ray.judge.outcome import Abstained, Failed, Outcome, Scored
from sif_ray.judge.reply import RESPONSE_FORMAT, read_score
from sif_ray.method.prompts import judge_system, judge_user
from sif_ray.observe import jsonl

FIRST_PAUSE_S = 0.5  # before a retry: random, at most this, doubled with every further retry
LONGEST_PAUSE_S = 20.0


@dataclass(frozen=True)
class Question:
    """One request to the judge."""

    model: str
    text: str  # of the user turn
    image: bytes  # encoded; empty = the judge sees none

    @cached_property
    def image_sha256(self) -> str:
        return hashlib.sha256(self.image).hexdigest() if self.image else ""

    @cached_property
    def key(self) -> str:
        """Hash of everything that decides about the score."""
        content = [self.model, judge_system(), self.text, self.image_sha256, RESPONSE_FORMAT]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def request(self, max_tokens: int) -> dict[str, Any]:
        """Keyword arguments of a chat completion."""
        content: list[dict[str, Any]] = [{"type": "text", "text": self.text}]
        if self.image:
            content.append({"type": "image_url", "image_url": {"url": _data_url(self.image)}})
        return {
            "model": self.model,
            "messages": [{"role": "system", "content": judge_system()}, {"role": "user", "content": content}],
            "response_format": RESPONSE_FORMAT,
            "temperature": 0.0,
            "max_tokens": max_tokens,
        }


class LlmJudge:
    """Asks a chat model for a score; see the module's docstring. For one event loop."""

    def __init__(self, config: JudgeConfig, api_key: str, folder: Path, worker: str, num_workers: int) -> None:
        """Keep `cache.sqlite`, shared by the workers, and the worker's own `audit-<worker>.jsonl` in `folder`.

        Of the limits of `config` this worker takes its share, one in `num_workers`. `api_key` = "": none.
        """
        self._config = config
        self._client = ChatClient(config.base_url, api_key, config.timeout_s)
        self._limits = Limits(max(1, config.max_concurrency // num_workers), config.requests_per_minute / num_workers)
        self._breaker = Breaker(config.breaker_failures, config.breaker_cooldown_s)
        self._cache = ScoreCache(folder / "cache.sqlite")
        self._audit = jsonl.open_for_append(folder / f"audit-{worker}.jsonl")
        self._meter = Meter(config.usd_per_million_tokens)
        self._asked: dict[str, asyncio.Task[Outcome]] = {}  # by key; equal answers of a group share one call

    async def judge(self, question: str, answer: str, prediction: str, image: bytes) -> Outcome:
        """See `sif_ray.judge.outcome.Judge`. Without a reference answer there is nothing to compare: `Abstained`."""
        if not answer.strip():
            return Abstained("the sample has no reference answer")
        item = Question(
            self._config.model, judge_user(question, answer, prediction), image if self._config.with_image else b""
        )
        asked = self._asked.get(item.key)
        if asked is None:
            asked = self._asked[item.key] = asyncio.create_task(self._outcome(item))
            asked.add_done_callback(lambda _: self._asked.pop(item.key))
        else:
            self._meter.count("cached")
        return await asyncio.shield(asked)  # who asked first may give up, the others wait on

    def metrics(self) -> dict[str, float]:
        """Totals of this worker: judge/calls, /cached, /retries, /scored, /abstained, /failed, /error/<reason>,
        /breaker_opened, /tokens_in, /tokens_out, /usd, /latency_mean_s, /latency_p95_s."""
        return self._meter.metrics() | {"judge/breaker_opened": float(self._breaker.times_opened)}

    async def close(self) -> None:
        """Give up what is being asked, and close connections and log."""
        for asked in self._asked.values():
            asked.cancel()
        await asyncio.gather(*self._asked.values(), return_exceptions=True)
        await self._client.close()
        self._audit.close()

    async def _outcome(self, item: Question) -> Outcome:
        score = await asyncio.to_thread(self._cache.get, item.key)
        if score is not None:
            self._meter.count("cached")
            return Scored(score)
        give_up_s = time.monotonic() + self._config.max_wait_s
        try:
            async for attempt in retrying(self._config.max_retries):
                with attempt:
                    score = await self._attempt(item, attempt.retry_state.attempt_number, give_up_s)
        except CallRefused as error:
            self._meter.count("abstained")
            return Abstained(error.reason)
        except CallError as error:
            self._meter.count("failed")
            return Failed(error.reason)
        self._meter.count("scored")
        await asyncio.to_thread(self._cache.put, item.key, score)
        return Scored(score)

    async def _attempt(self, item: Question, number: int, give_up_s: float) -> float:
        """Ask as soon as breaker and limits allow it, and until the judge is not down."""
        while True:
            if not await self._breaker.wait(give_up_s - time.monotonic()):
                raise CallError("judge is down")
            async with self._limits.slot():
                if not self._breaker.enter():
                    continue
                try:
                    return await self._ask(item, number, give_up_s)
                except CallError as error:
                    # An attempt while the judge is down says nothing about this answer, so it is none of its retries.
                    if not (error.retry and self._breaker.is_open) or time.monotonic() >= give_up_s:
                        raise

    async def _ask(self, item: Question, number: int, give_up_s: float) -> float:
        """Ask once, and tell everybody what came of it."""
        started_s = time.monotonic()
        completion, score, error = Completion(), None, None
        try:
            completion = await self._client.complete(item.request(self._config.max_tokens))
            score = score_of(completion)
        except CallError as caught:
            error = caught
        except BaseException:
            self._breaker.leave(None)
            raise
        if error and error.retry_after_s:
            if error.retry_after_s <= give_up_s - time.monotonic():
                self._limits.pause(error.retry_after_s)
            else:
                error.retry, error.down = False, True
        self._breaker.leave(alive=not (error and error.down))
        self._note(item, number, time.monotonic() - started_s, completion, score, error)
        if error:
            raise error
        return score

    def _note(
        self,
        item: Question,
        number: int,
        latency_s: float,
        completion: Completion,
        score: float | None,
        error: CallError | None,
    ) -> None:
        reason = error.reason if error else ""
        self._meter.attempt(number, latency_s, completion.tokens_in, completion.tokens_out, reason)
        line = {
            "time_s": time.time(),
            "key": item.key,
            "model": item.model,
            "attempt": number,
            "prompt": item.text,
            "image_sha256": item.image_sha256,
            "reply": completion.text,
            "score": score,
            "error": reason,
            "detail": error.detail if error else "",
            "latency_s": latency_s,
            "tokens_in": completion.tokens_in,
            "tokens_out": completion.tokens_out,
        }
        self._audit.write(jsonl.to_line(line))


def score_of(completion: Completion) -> float:
    """The score in a reply. Raises `CallError`, worth a retry, where there is none or the reply is cut."""
    if completion.finish_reason == "length":
        raise CallError("cut reply", f"judge.max_tokens reached: {completion.text[:200]!r}", retry=True)
    try:
        return read_score(completion.text)
    except ValueError as error:
        raise CallError("unreadable reply", str(error), retry=True) from error


def retrying(max_retries: int) -> AsyncRetrying:
    """Attempts with random, growing pauses between them, as long as the error is worth it."""
    return AsyncRetrying(
        stop=stop_after_attempt(max_retries + 1),
        wait=wait_random_exponential(multiplier=FIRST_PAUSE_S, max=LONGEST_PAUSE_S),
        retry=retry_if_exception(lambda error: isinstance(error, CallError) and error.retry),
        reraise=True,
    )


async def check(config: JudgeConfig, api_key: str) -> None:
    """Ask one easy question. Raises `ConfigError` when there is no score: a wrong address, key or model, a judge that
    has not started or cannot see."""
    photo = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(photo, "PNG")
    text = judge_user("Which colour is this?", "red", "It is red.")
    request = Question(config.model, text, photo.getvalue() if config.with_image else b"").request(config.max_tokens)
    client = ChatClient(config.base_url, api_key, config.timeout_s)
    try:
        async for attempt in retrying(config.max_retries):
            with attempt:
                score_of(await client.complete(request))
    except CallError as error:
        raise ConfigError(
            f"judge: {config.model!r} at {config.base_url} gave no score for a test question ({error}); start the "
            "judge, or correct judge.base_url, judge.model, judge.api_key_env, judge.with_image or judge.max_tokens"
        ) from error
    finally:
        await client.close()


def _data_url(image: bytes) -> str:
    with Image.open(io.BytesIO(image)) as opened:  # reads the header only
        kind = Image.MIME[opened.format or ""]
    return f"data:{kind};base64,{base64.b64encode(image).decode()}"
