"""The suite `serve`: what HTTP, Ray Serve and the gateway cost over calling the engine.

Two engines of one policy: one behind `sif-ray serve`, one in this process. Both get the same requests, chats with one
photograph each, in turns. Latency is one request at a time, and the overhead is the median of the differences request
by request. Throughput keeps more requests under way than the engine takes. No depth is estimated: that is work, not
overhead. Load, gateway and engine share this machine's cores; where they do not, the overhead is what remains.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file, save_file

from sif_ray.bench.findings import Findings, Goal, spread
from sif_ray.config import EngineConfig, SamplingConfig, ServeConfig
from sif_ray.policy.model import resolve_model
from sif_ray.rollout.engine import RolloutEngine, RolloutRequest
from sif_ray.serve.stage import serving
from sif_ray.toyworld.render import png, render
from sif_ray.toyworld.scenes import make_scene

log = logging.getLogger(__name__)

OVERHEAD_MS = 15.0
SHARE_OF_ENGINE = 0.9

QUESTION = "What is in this picture?"
Answer = Callable[[bytes, int], Awaitable[int]]
"""Photograph and seed to the number of tokens that were written."""


@dataclass(frozen=True)
class Load:
    """How much work."""

    one_by_one: int = 60
    at_once: int = 240
    in_flight: int = 32
    max_num_seqs: int = 16
    max_tokens: int = 64


def measure(repetitions: int, load: Load = Load()) -> Findings:
    """Latency and throughput of both ways."""
    with tempfile.TemporaryDirectory(prefix="sif_ray-bench-") as name:
        policy = write_babbling_policy(Path(name) / "policy")
        engine = EngineConfig(max_model_len=512, max_num_seqs=load.max_num_seqs, kv_cache_gib=0.5)
        config = ServeConfig(policy=policy, port=0, temperature=1.0, max_tokens=load.max_tokens, engine=engine)
        with serving(config) as base_url:
            return asyncio.run(_measure(base_url, config, load, repetitions))


def write_babbling_policy(folder: Path) -> str:
    """The toy policy with every token as likely as any other: how much it writes does not depend on what it sees."""
    shutil.copytree(resolve_model("toy"), folder)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"lm_head.weight": torch.zeros_like(weights["lm_head.weight"])}, folder / "model.safetensors")
    return str(folder)


async def _measure(base_url: str, config: ServeConfig, load: Load, repetitions: int) -> Findings:
    engine = RolloutEngine(config.policy, config.engine, config.prompt)
    await engine.start()
    limits = httpx.Limits(max_connections=load.in_flight)
    async with httpx.AsyncClient(base_url=base_url, limits=limits, timeout=config.timeout_s) as client:
        ways = {"gateway": _through_gateway(client, config), "engine": _by_engine(engine, config)}
        for answer in ways.values():
            await _one_by_one(answer, _photos(2))
        slower_ms: list[float] = []
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repetitions):
            photos = _photos(load.one_by_one)
            found = {name: await _one_by_one(answer, photos) for name, answer in ways.items()}
            slower_ms += [1000 * (a - b) for a, b in zip(found["gateway"], found["engine"], strict=True)]
            photos = _photos(load.at_once)
            for name, answer in ways.items():
                seconds[name] += found[name]
                rates[name].append(await _at_once(answer, photos, load.in_flight))
                log.info("bench serve: %s, %.1f tokens/s", name, rates[name][-1])
    await engine.shutdown()
    overhead_ms = statistics.median(slower_ms)
    share = statistics.median(a / b for a, b in zip(rates["gateway"], rates["engine"], strict=True))
    figures = {
        "load": asdict(load),
        "overhead_ms": spread(slower_ms),
        "latency_s": {name: spread(found) for name, found in seconds.items()},
        "tokens_per_s": {name: spread(found) for name, found in rates.items()},
    }
    return Findings(
        [
            Goal("overhead of the gateway, ms in the median", overhead_ms, OVERHEAD_MS, at_least=False),
            Goal("throughput through the gateway, of the engine's own", share, SHARE_OF_ENGINE, at_least=True),
        ],
        figures,
    )


def _through_gateway(client: httpx.AsyncClient, config: ServeConfig) -> Answer:
    async def answer(photo: bytes, seed: int) -> int:
        url = "data:image/png;base64," + base64.b64encode(photo).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
        request: dict[str, Any] = {"messages": [{"role": "user", "content": content}], "seed": seed}
        reply = await client.post("/v1/chat/completions", json=request | {"model": f"{config.model_name}-plain"})
        reply.raise_for_status()
        return int(reply.json()["usage"]["completion_tokens"])

    return answer


def _by_engine(engine: RolloutEngine, config: ServeConfig) -> Answer:
    sampling = SamplingConfig(temperature=config.temperature, max_tokens=config.max_tokens)
    content = ({"type": "image"}, {"type": "text", "text": QUESTION})
    messages = ({"role": "user", "content": content},)

    async def answer(photo: bytes, seed: int) -> int:
        request = RolloutRequest(str(seed), str(seed), "", (photo,), 1, sampling, seed=seed, messages=messages)
        return (await engine.generate(request)).num_tokens

    return answer


_scenes = itertools.count()


def _photos(count: int) -> list[bytes]:
    """Photographs that neither engine has seen: nothing comes from a cache."""
    return [png(render(make_scene(seed)).rgb) for seed in itertools.islice(_scenes, count)]


async def _one_by_one(answer: Answer, photos: Sequence[bytes]) -> list[float]:
    """Seconds of every request."""
    seconds = []
    for seed, photo in enumerate(photos):
        started_s = time.perf_counter()
        await answer(photo, seed)
        seconds.append(time.perf_counter() - started_s)
    return seconds


async def _at_once(answer: Answer, photos: Sequence[bytes], in_flight: int) -> float:
    """Tokens per second."""
    waiting = iter(enumerate(photos))
    written = 0

    async def work() -> None:
        nonlocal written
        for seed, photo in waiting:
            written += await answer(photo, seed)

    started_s = time.perf_counter()
    async with asyncio.TaskGroup() as workers:
        for _ in range(in_flight):
            workers.create_task(work())
    return written / (time.perf_counter() - started_s)
