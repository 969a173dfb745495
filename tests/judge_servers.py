"""A small OpenAI-compatible judge, and a proxy that breaks what passes through it. Real HTTP on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import io
import json
import random
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import aiohttp
from aiohttp import web
from PIL import Image

FAULTS = ("429", "500", "hang", "drip", "cut", "html", "schema", "reset")


def closeness(answer: str, prediction: str) -> float:
    """The verdict of the small judge."""
    return round(difflib.SequenceMatcher(None, answer, prediction).ratio(), 3)


def same_score(shown: dict[str, str]) -> str:
    return json.dumps({"score": closeness(shown["standard_answer"], shown["model_answer"])})


class SmallJudge:
    """Scores by `closeness`; refuses what the protocol excludes. Set `reply` for other replies."""

    def __init__(self, api_key: str = "", delay_s: float = 0.0) -> None:
        self.api_key, self.delay_s = api_key, delay_s
        self.reply: Callable[[dict[str, str]], Any] = same_score
        self.finish_reason = "stop"
        self.refusal: str | None = None
        self.shown: list[dict[str, str]] = []
        self.requests: list[dict[str, Any]] = []
        self.images: list[bytes] = []
        self.at_once = self.most_at_once = 0

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**25)
        app.router.add_post("/v1/chat/completions", self._complete)
        return app

    async def _complete(self, http: web.Request) -> web.Response:
        if self.api_key and http.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": {"message": "wrong key"}}, status=401)
        request = await http.json()
        text, *images = request["messages"][1]["content"]
        for image in images:
            encoded = b64decode(image["image_url"]["url"].split("base64,")[1])
            with Image.open(io.BytesIO(encoded)) as opened:
                opened.load()
            self.images.append(encoded)
        shown = json.loads(text["text"])
        self.requests.append(request)
        self.shown.append(shown)
        if len(shown["question"]) > 1000:
            return web.json_response({"error": {"message": "maximum context length"}}, status=400)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(self.delay_s)
        self.at_once -= 1
        message = {"role": "assistant", "content": self.reply(shown), "refusal": self.refusal}
        return web.json_response(
            {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": request["model"],
                "choices": [{"index": 0, "finish_reason": self.finish_reason, "message": message}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
            }
        )


class FaultyProxy:
    """Passes requests on to `upstream`, except where `faults` yields the name of a fault instead of None."""

    def __init__(self, upstream: str, faults: Iterable[str | None] = ()) -> None:
        self.upstream = upstream
        self.faults = iter(faults)
        self.retry_after = "0"
        self.arrivals: list[tuple[float, str | None]] = []  # monotonic time, fault

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**25)
        app.router.add_route("*", "/{path:.*}", self._pass)
        return app

    async def _pass(self, http: web.Request) -> web.StreamResponse:
        body = await http.read()
        fault = next(self.faults, None)
        self.arrivals.append((time.monotonic(), fault))
        if fault == "429":
            return web.json_response(
                {"error": {"message": "slow down"}}, status=429, headers={"Retry-After": self.retry_after}
            )
        if fault == "500":
            return web.Response(status=500, text="<h1>oops</h1>")
        if fault == "hang":
            await asyncio.sleep(30)
        if fault == "html":
            return web.Response(text="<h1>welcome to the proxy</h1>", content_type="text/html")
        if fault == "schema":
            return web.json_response({"error": "something, with status 200"})
        if fault == "reset":
            assert http.transport is not None
            http.transport.abort()
            return web.Response()
        headers = {name: http.headers[name] for name in ("Authorization", "Content-Type") if name in http.headers}
        async with (
            aiohttp.ClientSession() as session,
            session.request(http.method, self.upstream + http.path, data=body, headers=headers) as found,
        ):
            content, status, kind = await found.read(), found.status, found.content_type
        if fault in ("cut", "drip"):
            response = web.StreamResponse(status=status, headers={"Content-Type": kind})
            response.content_length = len(content)
            await response.prepare(http)
            if fault == "drip":
                for byte in content[:-1]:
                    await response.write(bytes([byte]))
                    await asyncio.sleep(0.02)
            await response.write(content[: len(content) // 2])
            assert http.transport is not None
            http.transport.abort()
            return response
        return web.Response(body=content, status=status, content_type=kind)


def at_random(share: float, seed: int, kinds: tuple[str, ...] = FAULTS) -> Iterator[str | None]:
    """A fault of any kind with probability `share`, without end."""
    rng = random.Random(seed)
    while True:
        yield rng.choice(kinds) if rng.random() < share else None


@contextlib.contextmanager
def served(app: web.Application, port: int = 0) -> Iterator[str]:
    """The application on loopback, in a thread of its own, as "http://127.0.0.1:<port>"."""
    started = threading.Event()
    state: dict[str, Any] = {}

    async def serve() -> None:
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port, reuse_address=True)
        await site.start()
        state.update(loop=asyncio.get_running_loop(), stop=asyncio.Event(), port=runner.addresses[0][1])
        started.set()
        await state["stop"].wait()
        await runner.cleanup()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), name="judge-server")
    thread.start()
    assert started.wait(10)
    try:
        yield f"http://127.0.0.1:{state['port']}"
    finally:
        state["loop"].call_soon_threadsafe(state["stop"].set)
        thread.join(10)
        assert not thread.is_alive()
