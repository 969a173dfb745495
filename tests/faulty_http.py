"""HTTP on loopback: an application in a thread, and a proxy that breaks what passes through it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import aiohttp
from aiohttp import web

FAULTS = ("429", "500", "hang", "drip", "cut", "html", "schema", "reset")


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
