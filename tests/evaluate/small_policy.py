"""An OpenAI-compatible policy that answers every question the same way. Real HTTP on loopback."""

from __future__ import annotations

import asyncio
import hashlib
import io
from base64 import b64decode
from typing import Any, NamedTuple

from aiohttp import web
from PIL import Image


class Seen(NamedTuple):
    model: str
    text: str  # of the user's turn
    system: str
    sizes: tuple[tuple[int, int], ...]  # of the images
    seed: int
    temperature: float


def written(model: str, text: str, seed: int) -> str:
    """What it writes: nothing but a function of the request."""
    digest = hashlib.sha256(f"{model}{text}{seed}".encode()).hexdigest()
    return (
        f"<think><area>[]</area><text>{digest[:8]}</text></think>\n<answer>{'left' if seed % 2 else 'right'}</answer>"
    )


class SmallPolicy:
    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.seen: list[Seen] = []

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**25)
        app.router.add_post("/v1/chat/completions", self._complete)
        return app

    async def _complete(self, http: web.Request) -> web.Response:
        request = await http.json()
        system = [turn["content"] for turn in request["messages"] if turn["role"] == "system"]
        content = request["messages"][-1]["content"]
        text = "".join(part["text"] for part in content if part["type"] == "text")
        sizes = tuple(_size(part["image_url"]["url"]) for part in content if part["type"] == "image_url")
        await asyncio.sleep(self.delay_s)
        if not text.startswith("Which colour is this?"):  # asked whether it works
            self.seen.append(
                Seen(request["model"], text, "".join(system), sizes, request["seed"], request["temperature"])
            )
        return _reply(written(request["model"], text, request["seed"]))


def _size(url: str) -> tuple[int, int]:
    with Image.open(io.BytesIO(b64decode(url.split("base64,")[1]))) as image:
        image.load()
        return image.size


def _reply(text: str) -> web.Response:
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return web.json_response(
        {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    )
