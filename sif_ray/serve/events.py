"""Replies that are sent as they are written, and the time that any reply may take."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

from fastapi.responses import StreamingResponse
from openai.types.chat import ChatCompletionChunk

from sif_ray.serve.protocol import EVENT_NAMES, Refusal, SifEvent
from sif_ray.serve.refusal import RequestRefused, refusal

Event = TypeVar("Event")


class Deadline:
    """The time that a request has, from now on."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._ends_s = asyncio.get_running_loop().time() + timeout_s

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Raises `RequestRefused` (504) when the body is not done by then."""
        try:
            async with asyncio.timeout_at(self._ends_s):
                yield
        except TimeoutError as error:
            raise RequestRefused(504, f"not answered within {self._timeout_s:g} s (timeout_s)") from error


def streamed(
    events: AsyncGenerator[Event], deadline: Deadline, write: Callable[[Event | Refusal], str], end: str = ""
) -> StreamingResponse:
    """Server-sent events. What goes wrong on the way is the last of them, without `end`."""

    async def written() -> AsyncIterator[str]:
        async with aclosing(events):
            try:
                while True:
                    async with deadline.kept():
                        event = await anext(events)
                    yield write(event)
            except StopAsyncIteration:
                if end:
                    yield end
            except RequestRefused as error:
                yield write(refusal(error.status, str(error)))

    return StreamingResponse(written(), media_type="text/event-stream")


def chat_event(event: ChatCompletionChunk | Refusal) -> str:
    """As OpenAI's clients read it."""
    body = event.model_dump_json() if isinstance(event, Refusal) else event.to_json(indent=None)
    return f"data: {body}\n\n"


def sif_event(event: SifEvent | Refusal) -> str:
    """As server-sent events are named and written."""
    return f"event: {EVENT_NAMES[type(event)]}\ndata: {event.model_dump_json()}\n\n"
