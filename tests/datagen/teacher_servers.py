"""A small OpenAI-compatible teacher. Real HTTP on loopback."""

from __future__ import annotations

import asyncio
import io
import json
import re
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from aiohttp import web
from PIL import Image

FRAME_TEXT = re.compile(r"normalized depth of (\[.*\]), as shown by the green box in the image below\.")
TOLD = re.compile(r"^The prompt is (.*), and the final gt answer is (.*)\. Never mention", re.MULTILINE)


@dataclass(frozen=True)
class Shown:
    """What a request says, read as a teacher would."""

    question: str
    answer: str
    areas: list[str]  # JSON, in the order shown
    photos: list[np.ndarray]  # (H, W, 3) uint8
    complaints: list[str]  # of replies before this one

    @property
    def is_easy(self) -> bool:
        """Not about a row."""
        return not self.areas


def read(messages: list[dict[str, Any]]) -> Shown:
    if messages[0]["role"] != "system":
        return Shown("", "", [], [], [])
    question, answer = TOLD.search(messages[0]["content"]).groups()
    areas, photos = [], []
    content = messages[1]["content"]
    for text, image in zip(content[::2], content[1::2], strict=True):
        assert text["type"] == "text" and image["type"] == "image_url"
        areas.append(FRAME_TEXT.search(text["text"])[1])
        encoded = b64decode(image["image_url"]["url"].removeprefix("data:image/jpeg;base64,"), validate=True)
        with Image.open(io.BytesIO(encoded)) as opened:
            photos.append(np.asarray(opened))
    roles = [message["role"] for message in messages[2:]]
    assert roles == ["assistant", "user"] * (len(roles) // 2)
    return Shown(question, answer, areas, photos, [message["content"] for message in messages[3::2]])


def trace_of(shown: Shown) -> str:
    steps = "".join(
        f"<area>{area}</area>\n<text>Look {number} at the photo.</text>" for number, area in enumerate(shown.areas)
    )
    return f"<think>{steps}</think>\n<answer>{shown.answer}</answer>"


def well_behaved(shown: Shown) -> str:
    return f"```\n{trace_of(shown)}\n```"


class SmallTeacher:
    """Answers with the trace that it is asked for, unless told otherwise."""

    def __init__(self) -> None:
        self.api_key = ""
        self.reply: Callable[[Shown], str] = well_behaved
        self.finish_reason: Callable[[Shown], str] = lambda shown: "stop"
        self.refusal: Callable[[Shown], str | None] = lambda shown: None
        self.status: Callable[[Shown], int] = lambda shown: 200
        self.seconds: Callable[[Shown], float] = lambda shown: 0.0
        self.shown: list[Shown] = []  # without the easy questions
        self.requests: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/v1/chat/completions", self._complete)
        return app

    async def _complete(self, http: web.Request) -> web.Response:
        given = http.headers.get("Authorization", "")
        if self.api_key and given != f"Bearer {self.api_key}":
            return web.json_response({"error": {"message": f"wrong key: {given}"}}, status=401)
        request = await http.json()
        shown = read(request["messages"])
        if not shown.is_easy:
            self.requests.append(request)
            self.shown.append(shown)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(self.seconds(shown))
        finally:
            self.at_once -= 1
        if (status := self.status(shown)) != 200:
            return web.json_response({"error": {"message": "no"}}, status=status)
        text = "Green." if shown.is_easy else self.reply(shown)
        message = {"role": "assistant", "content": text, "refusal": self.refusal(shown)}
        choice = {"index": 0, "finish_reason": self.finish_reason(shown), "message": message}
        usage = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
        body = {"id": "x", "object": "chat.completion", "created": 0, "model": request["model"], "choices": [choice]}
        return web.json_response({**body, "usage": usage})


def wrong_numbers(area: str) -> str:
    """The same area with its depths changed."""
    boxes = json.loads(area)
    return json.dumps([box | {"depth": round((box["depth"] + 0.5) % 1, 3)} for box in boxes])
