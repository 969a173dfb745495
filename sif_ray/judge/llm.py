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

- Retries used up: `Failed`. So is a reply that holds no score: the group's next answers are others, and may have one.
- A judge that answers nobody for longer than `max_wait_s`, a wrong key or model: `Unavailable`.
- A request that the server refuses for what it contains (content policy, too long): `Abstained`.
- While the breaker is open an easy question alone is asked: an outage shorter than `max_wait_s` costs nothing but time.
- What the policy wrote is not to be trusted; `sif_ray.method.prompts.judge_user` keeps it in its place.
- `judge/` in the run folder holds the cache and one audit log per worker. Every attempt is a line of it: key, prompt,
  hash of the photo, reply, score, error, seconds, tokens. The key covers the model, both messages, the photo and the
  reply's form; the system message is `sif_ray.method.prompts.judge_system`.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from sif_ray.config import ConfigError, JudgeConfig
from sif_ray.judge.cache import ScoreCache
from sif_ray.judge.caller import Call, Caller, ask_before_a_run
from sif_ray.judge.client import CallError, CallRefused, Completion, EndpointDown, image_part
from sif_ray.judge.outcome import Abstained, Failed, Outcome, Scored, Unavailable
from sif_ray.judge.reply import CUT_REPLY, RESPONSE_FORMAT, UNREADABLE_REPLY, read_score
from sif_ray.method.prompts import judge_system, judge_user


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
            content.append(image_part(self.image))
        return {
            "model": self.model,
            "messages": [{"role": "system", "content": judge_system()}, {"role": "user", "content": content}],
            "response_format": RESPONSE_FORMAT,
            "temperature": 0.0,
            "max_tokens": max_tokens,
        }

    def call(self, max_tokens: int) -> Call[float]:
        """To be made by a `Caller`."""
        note = {"key": self.key, "prompt": self.text, "image_sha256": self.image_sha256}
        return Call(lambda: self.request(max_tokens), score_of, note, result="score")


class LlmJudge:
    """Asks a chat model for a score; see the module's docstring. For one event loop."""

    def __init__(self, config: JudgeConfig, api_key: str, folder: Path, worker: str, num_workers: int) -> None:
        """Keep `cache.sqlite`, shared by the workers, and the worker's own `audit-<worker>.jsonl` in `folder`.

        Of the limits of `config` this worker takes its share, one in `num_workers`. `api_key` = "": none.
        """
        self._config = config
        audit, ping = folder / f"audit-{worker}.jsonl", _easy_call(config)
        self._caller = Caller("judge", config, api_key, audit, num_workers, ping)
        self._meter = self._caller.meter
        self._cache = ScoreCache(folder / "cache.sqlite")
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
        """Totals of this worker: judge/cached, /scored, /abstained, /failed, and those of `Caller.metrics`."""
        return self._caller.metrics()

    async def close(self) -> None:
        """Give up what is being asked, and close connections and log."""
        for asked in self._asked.values():
            asked.cancel()
        await asyncio.gather(*self._asked.values(), return_exceptions=True)
        await self._caller.close()

    async def _outcome(self, item: Question) -> Outcome:
        score = await asyncio.to_thread(self._cache.get, item.key)
        if score is not None:
            self._meter.count("cached")
            return Scored(score)
        try:
            score = await self._caller.call(item.call(self._config.max_tokens))
        except CallError as error:
            outcome = outcome_of(error, self._config)
            self._meter.count("abstained" if isinstance(outcome, Abstained) else "failed")
            return outcome
        self._meter.count("scored")
        await asyncio.to_thread(self._cache.put, item.key, score)
        return Scored(score)


def outcome_of(error: CallError, config: JudgeConfig) -> Abstained | Failed | Unavailable:
    """What an error of `Caller.call` says about an answer."""
    if isinstance(error, CallRefused):
        return Abstained(error.reason)
    where = f"judge: {config.model!r} at {config.base_url}"
    if isinstance(error, EndpointDown):
        return Unavailable(
            error.reason, f"{where} answered nothing for judge.max_wait_s = {config.max_wait_s:g} s ({error})"
        )
    if not error.retry:
        return Unavailable(error.reason, f"{where} answers no call ({error}); correct judge.api_key_env or judge.model")
    return Failed(error.reason)


def score_of(completion: Completion) -> float:
    """The score in a reply. Raises `CallError`, worth a retry, where there is none or the reply is cut."""
    if completion.finish_reason == "length":
        raise CallError(CUT_REPLY, f"judge.max_tokens reached: {completion.text[:200]!r}", retry=True)
    try:
        return read_score(completion.text)
    except ValueError as error:
        raise CallError(UNREADABLE_REPLY, str(error), retry=True) from error


async def check(config: JudgeConfig, api_key: str) -> None:
    """Ask one easy question. Raises `ConfigError` when there is no score: a wrong address, key or model, a judge that
    has not started or cannot see."""
    try:
        await ask_before_a_run(config, api_key, _easy_call(config))
    except CallError as error:
        raise ConfigError(
            f"judge: {config.model!r} at {config.base_url} gave no score for a test question ({error}); start the "
            "judge, or correct judge.base_url, judge.model, judge.api_key_env, judge.with_image or judge.max_tokens"
        ) from error


def _easy_call(config: JudgeConfig) -> Call[float]:
    photo = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(photo, "PNG")
    text = judge_user("Which colour is this?", "red", "It is red.")
    return Question(config.model, text, photo.getvalue() if config.with_image else b"").call(config.max_tokens)
