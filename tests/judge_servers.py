"""A small OpenAI-compatible judge. Real HTTP on loopback."""

from __future__ import annotations

import asyncio
import difflib
import io
import json
from base64 import b64decode
from collections.abc import Callable
from typing import Any

from aiohttp import web
from PIL import Image


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
