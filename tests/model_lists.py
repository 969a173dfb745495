"""An OpenAI-compatible server that says which models it has. Real HTTP on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from aiohttp import web


def model_list(api_key: str, models: Sequence[str], delay_s: float = 0.0) -> web.Application:
    """Refuses other keys than `api_key` ("" = takes any), and repeats them as careless servers do."""

    async def answer(http: web.Request) -> web.Response:
        await asyncio.sleep(delay_s)
        sent = http.headers.get("Authorization", "")
        if api_key and sent != f"Bearer {api_key}":
            return web.json_response({"error": {"message": f"wrong key {sent}"}}, status=401)
        return web.json_response({"object": "list", "data": [{"id": model} for model in models]})

    app = web.Application()
    app.router.add_get("/v1/models", answer)
    return app


def without_list(api_key: str) -> web.Application:
    """Has chat completions and no list of models."""

    async def answer(http: web.Request) -> web.Response:
        if http.headers.get("Authorization") != f"Bearer {api_key}":
            return web.json_response({"error": {"message": "wrong key"}}, status=401)
        return web.json_response({"error": {"message": "messages is missing"}}, status=400)

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    return app
