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
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from sif_ray import config as configuration
from sif_ray.chaos.process_tree import LOG, ProcessTree
from sif_ray.chaos.promise import Violation
from sif_ray.config import ServeConfig
from sif_ray.toyworld.render import png, render
from sif_ray.toyworld.scenes import make_scene

SERVER = "from sif_ray.cli import run_job; raise SystemExit(run_job('serve'))"
READY_TIMEOUT_S = 600.0
QUESTION = "How many balls are there?"
CUT, PROXY_ERROR = "cut off", "500 of HAProxy"
COME_BACK = ("429", "502", "503", "504", CUT, PROXY_ERROR)
"""What has a client ask again: statuses, connections that end before their reply, and the page that Serve has HAProxy
send for a gateway that was killed while it answered."""
PROXY_ERROR_HEADERS = {"content-type", "content-length"}  # of that page; a gateway's own 500 has more
ANSWERED = ("chat", "stream", "sif")  # kinds of requests that are for a whole answer
PHOTOS = 32


class Endpoint(ProcessTree):
    """The stage `serve` under `config`, which has a port."""

    def __init__(self, config: ServeConfig, folder: Path) -> None:
        self.config = config
        self.base_url = f"http://127.0.0.1:{config.port}"
        file = folder / "serve.yaml"
        file.write_text(configuration.to_yaml(config))
        super().__init__([sys.executable, "-c", SERVER, "--config", str(file)], folder / LOG)

    def wait_ready(self) -> None:
        """Until it would answer. Raises `Violation` when it ends before, or takes too long."""
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while not self._ready():
            self.check_runs()
            if time.monotonic() > deadline_s:
                raise Violation(f"not ready after {READY_TIMEOUT_S:g} s:\n{self.log_tail()}")
            time.sleep(0.5)

    def _ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.base_url}/readyz", timeout=10).status_code == 200
        return False


@dataclass(frozen=True)
class Reply:
    """What a client asked for, and what came of it: a status, or `CUT`."""

    kind: str
    outcome: str
    sent_s: float  # of time.monotonic
    ended_s: float


class Load:
    """Clients of an endpoint inside the body, each of which asks, waits for the reply and asks something else.

    `surprises` tells of replies that are no answer, no refusal of what is wrong, and do not ask to come back.
    """

    def __init__(self, endpoint: Endpoint, clients: int, seed: int) -> None:
        self._endpoint, self._clients = endpoint, clients
        self._rng = random.Random(f"sif_ray/load/{seed}")
        self._ended = threading.Event()
        self._thread = ThreadPoolExecutor(1, "load")
        self.replies: list[Reply] = []
        self.surprises: list[str] = []

    def __enter__(self) -> Self:
        self._asking = self._thread.submit(lambda: asyncio.run(self._ask_all()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.shutdown()
        if kind is None:
            self._asking.result()

    def check_runs(self) -> None:
        """Raises what has ended it."""
        if self._asking.done():
            self._asking.result()

    def answers_since(self, asked_s: float) -> int:
        """Whole answers to requests that were sent after a time of `time.monotonic`."""
        return sum(
            reply.sent_s > asked_s and reply.kind in ANSWERED and reply.outcome == "200" for reply in self.replies
        )

    async def _ask_all(self) -> None:
        async with (
            httpx.AsyncClient(base_url=self._endpoint.base_url, timeout=120) as client,
            asyncio.TaskGroup() as clients,
        ):
            for _ in range(self._clients):
                clients.create_task(self._ask_again(client))

    async def _ask_again(self, client: httpx.AsyncClient) -> None:
        kinds: dict[str, Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]] = {
            "chat": self._chat,
            "stream": self._stream,
            "sif": self._sif,
            "broken image": self._broken_image,
            "hang up": self._hang_up,
        }
        while not self._ended.is_set():
            kind, ask = self._rng.choice(list(kinds.items()))
            sent_s = time.monotonic()
            try:
                outcome = outcome_of(await ask(client))
            except httpx.TransportError:
                outcome = CUT
            self.replies.append(Reply(kind, outcome, sent_s, time.monotonic()))
            if outcome in COME_BACK:
                await asyncio.sleep(0.5)
            elif outcome != ("400" if kind == "broken image" else "200"):
                self.surprises.append(f"{kind}: {outcome} at {time.strftime('%H:%M:%S')}")

    async def _chat(self, client: httpx.AsyncClient) -> httpx.Response:
        reply = await client.post("/v1/chat/completions", json=self._asked())
        if reply.status_code == 200:
            written = reply.json()["usage"]["completion_tokens"]
            if written != self._endpoint.config.max_tokens:
                self.surprises.append(f"chat: {written} tokens")
        return reply

    async def _stream(self, client: httpx.AsyncClient) -> httpx.Response:
        async with client.stream("POST", "/v1/chat/completions", json=self._asked(stream=True)) as reply:
            body = await reply.aread()
        if reply.status_code == 200 and not body.endswith(b"data: [DONE]\n\n"):
            raise httpx.RemoteProtocolError("the stream ended early")
        return reply

    async def _sif(self, client: httpx.AsyncClient) -> httpx.Response:
        files, data = {"image": self._photo()}, {"question": QUESTION}
        reply = await client.post("/v1/sif", files=files, data=data, params={"overlay": True})
        if reply.status_code == 200 and not reply.json()["overlay_image"]:
            self.surprises.append("sif: no overlay")
        return reply

    async def _broken_image(self, client: httpx.AsyncClient) -> httpx.Response:
        files, data = {"image": self._photo()[:200]}, {"question": QUESTION}
        return await client.post("/v1/sif", files=files, data=data)

    async def _hang_up(self, client: httpx.AsyncClient) -> httpx.Response:
        async with client.stream("POST", "/v1/chat/completions", json=self._asked(stream=True)) as reply:
            await anext(reply.aiter_bytes(), b"")
        return reply

    def _photo(self) -> bytes:
        return _photo(self._rng.randrange(PHOTOS))

    def _asked(self, **others: Any) -> dict[str, Any]:
        url = "data:image/png;base64," + base64.b64encode(self._photo()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
        return {"model": "sif", "messages": [{"role": "user", "content": content}], **others}


def outcome_of(reply: httpx.Response) -> str:
    """Its status, or `PROXY_ERROR`."""
    if reply.status_code == 500 and set(reply.headers) <= PROXY_ERROR_HEADERS:
        return PROXY_ERROR
    return str(reply.status_code)


@functools.cache
def _photo(seed: int) -> bytes:
    return png(render(make_scene(seed)).rgb)
