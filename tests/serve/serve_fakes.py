"""Where the models are, for tests of what lies around them."""

from __future__ import annotations

import io
import multiprocessing
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import numpy as np
import psutil
import uvicorn
from PIL import Image

from sif_ray.config import ServeConfig
from sif_ray.depth.encoding import depth_png
from sif_ray.serve.access import Keys
from sif_ray.serve.api import build_api
from sif_ray.serve.backends import Ask, Generation, Refused
from sif_ray.serve.service import SifService

TRACE = (
    '<think><area>[{"bbox_2d":[0.000,0.000,1.000,1.000],"depth":0.500}]</area>\n<text>Look at the whole image.</text>'
    '<area>[{"bbox_2d":[0.100,0.200,0.300,0.400],"depth":0.250}]</area>\n<text>Here is the red ball.</text></think>\n'
    "<answer>red ball</answer>"
)


class Policy:
    """Remembers what it was asked and says what it is told to, streamed in pieces of a few characters."""

    def __init__(self) -> None:
        self.text = TRACE
        self.seen: list[Ask] = []
        self.closed = 0

    async def generate(self, ask: Ask) -> Generation | Refused:
        if ask.question == "too long":
            return Refused("prompt of 9999 tokens leaves no room")
        self.seen.append(ask)
        return Generation(self.text, 7, num_prompt_tokens=30, num_tokens=len(self.text))

    async def stream(self, ask: Ask) -> AsyncIterator[Generation | Refused]:
        whole = await self.generate(ask)
        if isinstance(whole, Refused):
            yield whole
            return
        pieces = [self.text[i : i + 5] for i in range(0, len(self.text), 5)] or [""]
        try:
            for index, piece in enumerate(pieces, 1):
                last = index == len(pieces)
                yield Generation(piece, 7, 30, len(piece), finish_reason="stop" if last else None)
        finally:
            self.closed += 1


async def slope(photo: bytes) -> bytes:
    """Nearer to the left, in the size of the image."""
    width, height = Image.open(io.BytesIO(photo)).size
    return depth_png(np.tile(np.linspace(0, 1, width), (height, 1)))


def encoded(size=(40, 30), form="PNG", mode="RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).convert(mode).save(buffer, format=form, **options)
    return buffer.getvalue()


@contextmanager
def http_server(config: ServeConfig, keys: dict[str, str]) -> Iterator[tuple[str, psutil.Process]]:
    """The HTTP interface around the fakes in a process of its own: its base URL, and the process."""
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts at once; the server answers when it is there
        process = multiprocessing.get_context("spawn").Process(target=_serve, args=(listener, config, keys))
        process.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", psutil.Process(process.pid)
        finally:
            process.terminate()
            process.join()


def _serve(listener: socket.socket, config: ServeConfig, keys: dict[str, str]) -> None:
    api = build_api(SifService(config, slope, Policy()), Keys(keys))
    uvicorn.Server(uvicorn.Config(api, log_level="error")).run(sockets=[listener])
