"""The suite `serve`: what HTTP, Ray Serve and the gateway cost over calling the engine.

The same chats with one photograph each, and outputs of one length, are put to `sif-ray serve` and to an engine in this
process, in turns; no photograph comes twice. Both are ready all the time, so that turns are short and what else the
machine does meets both; the one that is not asked takes no time. Overhead is measured request by request, one at a
time: what the client waits, less what the call of the engine took inside (`Server-Timing: engine`). Throughput keeps
more requests under way than the engine takes, on both ways. No depth is estimated: that is work, not overhead. Load,
gateway and engine share this machine's cores: with few of them, what the gateway computes is taken from the engine.
RAY_SERVE_ENABLE_HA_PROXY=0 in the environment measures Ray's own proxy in front of the gateway instead of HAProxy.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import logging
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import torch
from safetensors.torch import load_file, save_file

from sif_ray.bench.findings import Findings, Goal, interleaved, share, spread
from sif_ray.config import EngineConfig, SamplingConfig, ServeConfig
from sif_ray.policy.model import resolve_model
from sif_ray.rollout.engine import RolloutEngine, RolloutRequest
from sif_ray.serve.stage import serving
from sif_ray.toyworld.render import png, render
from sif_ray.toyworld.scenes import make_scene

log = logging.getLogger(__name__)

OVERHEAD_MS = 15.0
SHARE_OF_ENGINE = 0.9

WARM_UP = 3  # requests that do not count
QUESTION = "What is in this picture?"
Answer = Callable[[bytes, int], Awaitable[tuple[int, float]]]
"""Photograph and tokens to write, to the number of tokens that were written and the seconds of the engine."""


@dataclass(frozen=True)
class Load:
    """How much work."""

    one_by_one: int = 30
    one_by_one_tokens: int = 16  # of each; what comes on top of them does not depend on their number
    at_once: int = 96
    at_once_tokens: int = 256  # as a trace of three looks has in Qwen's tokenizer, where every digit is a token
    in_flight: int = 32
    max_num_seqs: int = 16


def measure(repetitions: int, load: Load = Load()) -> Findings:
    """Latency and throughput of both ways."""
    with tempfile.TemporaryDirectory(prefix="sif_ray-bench-") as name:
        policy = write_babbling_policy(Path(name) / "policy")
        engine_config = EngineConfig(max_model_len=512, max_num_seqs=load.max_num_seqs, kv_cache_gib=0.5)
        config = ServeConfig(
            policy=policy, port=0, temperature=0.0, max_tokens=load.at_once_tokens, engine=engine_config
        )
        with serving(config) as base_url, asyncio.Runner() as runner, _engine_alone(config, runner) as engine:
            seeds = {name: itertools.count() for name in ("gateway", "engine")}

            def gateway_turn() -> _Turn:
                return runner.run(_gateway_turn(config, base_url, load, seeds["gateway"]))

            def engine_turn() -> _Turn:
                return runner.run(_turn("engine", _by_engine(engine, config), load, seeds["engine"]))

            found = interleaved({"gateway": gateway_turn, "engine": engine_turn}, repetitions)
    latencies_ms = {name: [1000 * second for turn in turns for second in turn.seconds] for name, turns in found.items()}
    rates = {name: [turn.tokens_per_s for turn in turns] for name, turns in found.items()}
    overheads_ms = [1000 * second for turn in found["gateway"] for second in turn.beside_engine]
    overhead_ms = statistics.median(overheads_ms)
    of_engine = share(rates["gateway"], rates["engine"])
    goals = [
        Goal("overhead of the gateway, ms in the median", overhead_ms, OVERHEAD_MS, at_least=False),
        Goal("throughput through the gateway, of the engine's own", of_engine, SHARE_OF_ENGINE, at_least=True),
    ]
    figures = {
        "load": asdict(load),
        "proxy": "Ray Serve's own" if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "0" else "HAProxy",
        "overhead_ms": spread(overheads_ms),
        "latency_ms": {name: spread(values) for name, values in latencies_ms.items()},
        "tokens_per_s": {name: spread(values) for name, values in rates.items()},
    }
    return Findings(goals, figures)


@dataclass(frozen=True)
class _Turn:
    seconds: list[float]  # of every request, one by one
    beside_engine: list[float]  # of them, not spent in the engine
    tokens_per_s: float  # at once


@contextlib.contextmanager
def _engine_alone(config: ServeConfig, runner: asyncio.Runner) -> Iterator[RolloutEngine]:
    engine = RolloutEngine(config.policy, config.engine, config.prompt)
    runner.run(engine.start())
    try:
        yield engine
    finally:
        runner.run(engine.shutdown())


async def _gateway_turn(config: ServeConfig, base_url: str, load: Load, seeds: Iterator[int]) -> _Turn:
    limits = httpx.Limits(max_connections=load.in_flight)
    async with httpx.AsyncClient(base_url=base_url, limits=limits, timeout=config.timeout_s) as client:
        return await _turn("gateway", _through_gateway(client, config), load, seeds)


async def _turn(name: str, answer: Answer, load: Load, seeds: Iterator[int]) -> _Turn:
    number = WARM_UP + load.one_by_one + load.at_once
    photos = [png(render(make_scene(seed)).rgb) for seed in itertools.islice(seeds, number)]
    first, others = photos[: WARM_UP + load.one_by_one], photos[WARM_UP + load.one_by_one :]
    timed = (await _one_by_one(answer, first, load.one_by_one_tokens))[WARM_UP:]
    seconds = [total_s for total_s, _ in timed]
    rate = await _at_once(answer, others, load.at_once_tokens, load.in_flight)
    log.info("bench serve: %s, %.1f ms, %.0f tokens/s", name, 1000 * statistics.median(seconds), rate)
    return _Turn(seconds, [total_s - engine_s for total_s, engine_s in timed], rate)


def write_babbling_policy(folder: Path) -> str:
    """The toy policy with every token as likely as any other; greedy, it writes its first token without an end."""
    shutil.copytree(resolve_model("toy"), folder)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"lm_head.weight": torch.zeros_like(weights["lm_head.weight"])}, folder / "model.safetensors")
    return str(folder)


def _through_gateway(client: httpx.AsyncClient, config: ServeConfig) -> Answer:
    async def answer(photo: bytes, num_tokens: int) -> tuple[int, float]:
        url = "data:image/png;base64," + base64.b64encode(photo).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
        request = {"model": f"{config.model_name}-plain", "messages": [{"role": "user", "content": content}]}
        request["max_tokens"] = num_tokens
        reply = await client.post("/v1/chat/completions", json=request)
        reply.raise_for_status()
        timing = dict(part.split(";dur=") for part in reply.headers["server-timing"].split(", "))
        return int(reply.json()["usage"]["completion_tokens"]), float(timing["engine"]) / 1000

    return answer


def _by_engine(engine: RolloutEngine, config: ServeConfig) -> Answer:
    content = ({"type": "image"}, {"type": "text", "text": QUESTION})
    messages = ({"role": "user", "content": content},)

    async def answer(photo: bytes, num_tokens: int) -> tuple[int, float]:
        sampling = SamplingConfig(temperature=config.temperature, max_tokens=num_tokens)
        request = RolloutRequest("bench", "bench", "", (photo,), 1, sampling, messages=messages)
        started_s = time.perf_counter()
        group = await engine.generate(request)
        return group.num_tokens, time.perf_counter() - started_s

    return answer


async def _one_by_one(answer: Answer, photos: Sequence[bytes], num_tokens: int) -> list[tuple[float, float]]:
    """Seconds of every request, and of the engine in it."""
    timed = []
    for photo in photos:
        started_s = time.perf_counter()
        _, engine_s = await answer(photo, num_tokens)
        timed.append((time.perf_counter() - started_s, engine_s))
    return timed


async def _at_once(answer: Answer, photos: Sequence[bytes], num_tokens: int, in_flight: int) -> float:
    """Tokens per second."""
    waiting = iter(photos)
    written = 0

    async def work() -> None:
        nonlocal written
        for photo in waiting:
            found, _ = await answer(photo, num_tokens)
            written += found

    started_s = time.perf_counter()
    async with asyncio.TaskGroup() as workers:
        for _ in range(in_flight):
            workers.create_task(work())
    return written / (time.perf_counter() - started_s)
