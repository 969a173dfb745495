"""A served policy in a process of its own, and clients that never stop asking it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from sif_ray import config as configuration
from sif_ray.chaos.process_tree import ProcessTree
from sif_ray.chaos.promise import promise
from sif_ray.config import ServeConfig
from sif_ray.toyworld.render import png, render
from sif_ray.toyworld.scenes import make_scene

SERVER = "from sif_ray.cli import run_job; raise SystemExit(run_job('serve'))"
READY_TIMEOUT_S = 600.0
QUESTION = "How many balls are there?"
COME_BACK = (429, 502, 503, 504)
"""Statuses that tell a client to ask again; 502 is HAProxy's for a gateway that was killed while it answered."""
PHOTOS = 32
CUT = "cut off"  # a connection that ended before its reply


class Endpoint(ProcessTree):
    """The stage `serve` under `config`, which has a port."""

    def __init__(self, config: ServeConfig, folder: Path) -> None:
        self.config = config
        self.base_url = f"http://127.0.0.1:{config.port}"
        file = folder / "serve.yaml"
        file.write_text(configuration.to_yaml(config))
        super().__init__([sys.executable, "-c", SERVER, "--config", str(file)], folder / "log.txt")

    def wait_ready(self) -> None:
        """Until it would answer. Raises `Violation` when it ends before, or takes too long."""
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while not self._ready():
            self.check_runs()
            promise(time.monotonic() < deadline_s, f"not ready after {READY_TIMEOUT_S:g} s:\n{self.log_tail()}")
            time.sleep(0.5)

    def _ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.base_url}/readyz", timeout=10).status_code == 200
        return False


class Load:
    """Clients of an endpoint inside the body, each of which asks, waits for the reply and asks something else.

    `statuses` counts what came back, e.g. {"chat 200": 311, "broken image 400": 20, "chat cut off": 1}; `surprises`
    tells of replies that are neither an answer, nor a refusal of what is wrong, nor a request to come back.
    """

    def __init__(self, endpoint: Endpoint, clients: int, seed: int) -> None:
        self._endpoint, self._clients = endpoint, clients
        self._rng = random.Random(f"sif_ray/load/{seed}")
        self._answered: list[float] = []  # when requests were sent that got a whole answer
        self._thread = threading.Thread(target=lambda: asyncio.run(self._ask_all()), name="load")
        self._ended = threading.Event()
        self.statuses: Counter[str] = Counter()
        self.surprises: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def answers_since(self, asked_s: float) -> int:
        """Whole answers to requests that were sent after a time of `time.monotonic`."""
        return sum(sent_s > asked_s for sent_s in self._answered)

    async def _ask_all(self) -> None:
        async with (
            httpx.AsyncClient(base_url=self._endpoint.base_url, timeout=120) as client,
            asyncio.TaskGroup() as clients,
        ):
            for _ in range(self._clients):
                clients.create_task(self._ask_again(client))

    async def _ask_again(self, client: httpx.AsyncClient) -> None:
        kinds: dict[str, Callable[[httpx.AsyncClient], Awaitable[int]]] = {
            "chat": self._chat,
            "stream": self._stream,
            "sif": self._sif,
            "broken image": self._broken_image,
            "hang up": self._hang_up,
        }
        while not self._ended.is_set():
            name, ask = self._rng.choice(list(kinds.items()))
            sent_s = time.monotonic()
            try:
                status = await ask(client)
            except httpx.TransportError:
                self.statuses[f"{name} {CUT}"] += 1
                await asyncio.sleep(0.5)
                continue
            self.statuses[f"{name} {status}"] += 1
            wanted = 400 if name == "broken image" else 200
            if status == 200 and name != "hang up":
                self._answered.append(sent_s)
            elif status in COME_BACK:
                await asyncio.sleep(0.5)
            if status != wanted and status not in COME_BACK:
                self.surprises.append(f"{name}: {status}")

    async def _chat(self, client: httpx.AsyncClient) -> int:
        reply = await client.post("/v1/chat/completions", json=self._asked())
        if reply.status_code == 200 and reply.json()["usage"]["completion_tokens"] != self._endpoint.config.max_tokens:
            self.surprises.append(reply.text)
        return reply.status_code

    async def _stream(self, client: httpx.AsyncClient) -> int:
        async with client.stream("POST", "/v1/chat/completions", json=self._asked(stream=True)) as reply:
            text = (await reply.aread()).decode()
        if reply.status_code == 200 and not text.endswith("data: [DONE]\n\n"):
            raise httpx.RemoteProtocolError("the stream ended early")
        return reply.status_code

    async def _sif(self, client: httpx.AsyncClient) -> int:
        files, data = {"image": self._photo()}, {"question": QUESTION}
        return (await client.post("/v1/sif", files=files, data=data, params={"overlay": True})).status_code

    async def _broken_image(self, client: httpx.AsyncClient) -> int:
        files, data = {"image": self._photo()[:200]}, {"question": QUESTION}
        return (await client.post("/v1/sif", files=files, data=data)).status_code

    async def _hang_up(self, client: httpx.AsyncClient) -> int:
        async with client.stream("POST", "/v1/chat/completions", json=self._asked(stream=True)) as reply:
            await anext(reply.aiter_bytes(), b"")
        return reply.status_code

    def _photo(self) -> bytes:
        return _photo(self._rng.randrange(PHOTOS))

    def _asked(self, **others: Any) -> dict[str, Any]:
        url = "data:image/png;base64," + base64.b64encode(self._photo()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
        return {"model": "sif", "messages": [{"role": "user", "content": content}], **others}


@functools.cache
def _photo(seed: int) -> bytes:
    return png(render(make_scene(seed)).rgb)
