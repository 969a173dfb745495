"""OpenAI's chat completions by a `SifService`. No HTTP here; replies are the openai package's own types.

Two models for the policy, and two for each of its adapters. `sif` takes one question about one image, shows the policy
what it was trained on and answers with the content of the answer block; the thinking is `reasoning_content`, the field
other servers of reasoning models use. `sif-plain` hands the messages to the policy as they are, and all that it writes
is the content.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from openai.types import CompletionUsage, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from sif_ray.config import SamplingConfig
from sif_ray.serve.answer_split import AnswerSplit, Part, split_answer
from sif_ray.serve.backends import Ask, Generation, Refused
from sif_ray.serve.protocol import ChatMessage, ChatRequest, ImagePart
from sif_ray.serve.record import current
from sif_ray.serve.refusal import RequestRefused
from sif_ray.serve.service import SifService, accepted

PLAIN = "-plain"
MAX_CHAT_IMAGES = 2  # what an engine is started for


class ChatService:
    """Example: `await ChatService(service).complete(ChatRequest(model="sif", messages=[...]))`."""

    def __init__(self, service: SifService) -> None:
        self._service = service
        self._plain = {f"{name}{PLAIN}": adapter for name, adapter in service.models.items()}
        self._names = (*service.models, *self._plain)
        self._started_s = int(time.time())

    def models(self) -> list[Model]:
        return [Model(id=name, created=self._started_s, object="model", owned_by="sif_ray") for name in self._names]

    async def complete(self, request: ChatRequest) -> ChatCompletion:
        """The whole reply. Raises `RequestRefused`."""
        written = accepted(await self._service.policy.generate(await self._ask(request)))
        part = Part(answer=written.text) if request.model in self._plain else split_answer(written.text)
        message = {"role": "assistant", "content": part.answer} | _reasoning(part)
        return ChatCompletion.model_validate(
            {
                "id": f"chatcmpl-{uuid.uuid4().hex}",
                "object": "chat.completion",
                "created": int(time.time()),
                "model": request.model,
                "choices": [{"index": 0, "message": message, "finish_reason": written.finish_reason}],
                "usage": _usage(written.num_prompt_tokens, written.num_tokens),
                "policy_version": written.policy_version,
            }
        )

    async def stream(self, request: ChatRequest) -> AsyncGenerator[ChatCompletionChunk]:
        """The reply as it is written. Raises `RequestRefused` here, before anything has been sent."""
        parts = self._service.policy.stream(await self._ask(request))
        return self._chunks(request, accepted(await anext(parts)), parts)

    async def _chunks(
        self, request: ChatRequest, first: Generation, others: AsyncIterator[Generation | Refused]
    ) -> AsyncGenerator[ChatCompletionChunk]:
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": request.model,
            "policy_version": first.policy_version,
        }

        def chunk(delta: dict[str, str], finish_reason: str | None = None) -> ChatCompletionChunk:
            choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
            return ChatCompletionChunk.model_validate(head | {"choices": [choice]})

        yield chunk({"role": "assistant", "content": ""})
        split = AnswerSplit()
        num_tokens = 0
        async for generation in _chained(first, others):
            num_tokens += generation.num_tokens
            plain = request.model in self._plain
            if delta := _delta(Part(answer=generation.text) if plain else split.feed(generation.text)):
                yield chunk(delta)
            if generation.finish_reason:
                if delta := _delta(split.end()):
                    yield chunk(delta)
                yield chunk({}, generation.finish_reason)
        if request.stream_options and request.stream_options.include_usage:
            usage = _usage(first.num_prompt_tokens, num_tokens)
            yield ChatCompletionChunk.model_validate(head | {"choices": [], "usage": usage})

    async def _ask(self, request: ChatRequest) -> Ask:
        texts = [text for message in request.messages for text in _texts(message)]
        images = [image for message in request.messages for image in _images(message)]
        self._service.check_text("messages: their text", "".join(texts))
        if request.model not in self._names:
            raise RequestRefused(404, f"model {request.model!r} is not served; there are {', '.join(self._names)}")
        if request.model not in self._plain:
            if len(request.messages) > 1 or request.messages[0].role != "user" or len(images) != 1:
                raise RequestRefused(
                    422,
                    f"messages: {request.model!r} takes one user message with one image and a question, as the policy "
                    f"was trained; {len(request.messages)} messages with {len(images)} images were sent. "
                    f"'{request.model}{PLAIN}' takes other chats",
                )
            ask, _ = await self._service.prepare(
                await self._service.load_image(images[0]),
                "\n".join(texts),
                self._sampling(request),
                request.model,
                request.seed,
            )
            return ask
        if not 0 < len(images) <= MAX_CHAT_IMAGES:
            raise RequestRefused(422, f"messages: {len(images)} images were sent; 1 to {MAX_CHAT_IMAGES} are accepted")
        current().model = request.model
        photos = [await self._service.read_photo(await self._service.load_image(image)) for image in images]
        return Ask(
            tuple(photo.encoded for photo in photos),
            self._sampling(request),
            messages=tuple(_message(message) for message in request.messages),
            seed=request.seed,
            adapter=self._plain[request.model],
        )

    def _sampling(self, request: ChatRequest) -> SamplingConfig:
        """What the request asks for, within what the server's owner has set."""
        default = self._service.sampling
        wanted = request.max_completion_tokens or request.max_tokens or default.max_tokens
        return SamplingConfig(
            temperature=default.temperature if request.temperature is None else request.temperature,
            top_p=default.top_p if request.top_p is None else request.top_p,
            max_tokens=min(wanted, default.max_tokens),
        )


async def _chained(first: Generation, others: AsyncIterator[Generation | Refused]) -> AsyncIterator[Generation]:
    yield first
    async for generation in others:
        yield accepted(generation)


def _texts(message: ChatMessage) -> list[str]:
    if isinstance(message.content, str):
        return [message.content]
    return [part.text for part in message.content if not isinstance(part, ImagePart)]


def _images(message: ChatMessage) -> list[str]:
    if isinstance(message.content, str):
        return []
    return [part.image_url.url for part in message.content if isinstance(part, ImagePart)]


def _message(message: ChatMessage) -> dict[str, Any]:
    """A message as chat templates take it."""
    if isinstance(message.content, str):
        return {"role": message.role, "content": message.content}
    parts = [{"type": "image"} if isinstance(part, ImagePart) else part.model_dump() for part in message.content]
    return {"role": message.role, "content": parts}


def _reasoning(part: Part) -> dict[str, str]:
    return {"reasoning_content": part.thinking} if part.thinking else {}


def _delta(part: Part) -> dict[str, str]:
    return _reasoning(part) | ({"content": part.answer} if part.answer else {})


def _usage(num_prompt_tokens: int, num_tokens: int) -> dict[str, int]:
    return CompletionUsage(
        prompt_tokens=num_prompt_tokens, completion_tokens=num_tokens, total_tokens=num_prompt_tokens + num_tokens
    ).model_dump(exclude_unset=True)
