"""Ten times as many requests at once as there is room for: some are answered, the others are told when to come back."""

from __future__ import annotations

import asyncio
import base64
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx
import psutil
import pytest

from sif_ray.bench.serve import write_babbling_policy
from sif_ray.config import EngineConfig, ServeConfig
from sif_ray.serve.stage import serving
from sif_ray.toyworld.render import png, render
from sif_ray.toyworld.scenes import make_scene

AT_ONCE = 4  # in the engine
ROOM = AT_ONCE + 4 * AT_ONCE  # with those that wait for it
OVERLOAD = 10 * ROOM
LASTS_S = 20.0
NUM_TOKENS = 40
CONFIG = ServeConfig(
    port=0, max_tokens=NUM_TOKENS, engine=EngineConfig(max_model_len=512, max_num_seqs=AT_ONCE, kv_cache_gib=0.25)
)


@dataclass
class Told:
    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


async def overload(base_url: str) -> Told:
    """`OVERLOAD` clients that ask again as soon as they have a reply."""
    told = Told()
    url = "data:image/png;base64," + base64.b64encode(png(render(make_scene(3)).rgb)).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "How many balls are there?"}]
    asked = {"model": "sif", "messages": [{"role": "user", "content": content}]}
    ends_s = time.monotonic() + LASTS_S

    async def ask_again(client: httpx.AsyncClient) -> None:
        while time.monotonic() < ends_s:
            reply = await client.post("/v1/chat/completions", json=asked)
            told.statuses[reply.status_code] += 1
            if reply.status_code == 200:
                if reply.json()["usage"]["completion_tokens"] != NUM_TOKENS:
                    told.faults.append(reply.text)
            elif reply.status_code not in (429, 503) or int(reply.headers.get("retry-after", 0)) < 1:
                told.faults.append(f"{reply.status_code} {reply.headers} {reply.text}")

    limits = httpx.Limits(max_connections=OVERLOAD)
    async with (
        httpx.AsyncClient(base_url=base_url, limits=limits, timeout=120) as client,
        asyncio.TaskGroup() as askers,
    ):
        for _ in range(OVERLOAD):
            askers.create_task(ask_again(client))
    return told


def memory_bytes() -> int:
    """Of all processes of the application and of Ray, without what they share."""
    found = 0
    for process in psutil.Process().children(recursive=True):
        try:
            found += process.memory_full_info().uss
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "max_requests", [CONFIG.max_requests, ROOM], ids=["the engine's queue", "the gateway's places"]
)
def test_what_is_too_much_is_told_to_come_back(ray_local, tmp_path, max_requests):
    config = ServeConfig(**vars(CONFIG) | {"policy": write_babbling_policy(tmp_path / "policy")})
    config.max_requests = max_requests
    with serving(config) as base_url:
        httpx.post(f"{base_url}/v1/sif", files={"image": png(render(make_scene(1)).rgb)}, data={"question": "?"})
        before_bytes = memory_bytes()
        told = asyncio.run(overload(base_url))
        peak_bytes = memory_bytes()
        assert not told.faults, told.faults[:3]
        assert told.statuses[200] >= ROOM
        assert told.statuses[503] > told.statuses[200]

        ends_s = time.monotonic() + 60
        while (after_bytes := memory_bytes()) > 1.1 * before_bytes and time.monotonic() < ends_s:
            time.sleep(1)
        sizes = [round(size / 1e6) for size in (before_bytes, peak_bytes, after_bytes)]
        print(f"{dict(told.statuses)}; MB before, at the end of the load, afterwards: {sizes}")
        assert after_bytes <= 1.1 * before_bytes, sizes
