"""The HTTP interface of a `SifService`: bounded bodies, and a clear 4xx for everything that is wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from openai import BaseModel as OpenAiModel
from openai.types.chat import ChatCompletionChunk
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from sif_ray.config import ServeConfig
from sif_ray.serve.access import Keys, Places, Rate
from sif_ray.serve.chat import MAX_CHAT_IMAGES, ChatService
from sif_ray.serve.page_files import add_page
from sif_ray.serve.protocol import EVENT_NAMES, ChatRequest, Problem, Refusal, SifEvent, SifRequest, SifResponse
from sif_ray.serve.record import Recorded, RequestRecord, current
from sif_ray.serve.refusal import RequestRefused
from sif_ray.serve.service import SifService

_MESSAGE_END_CHARS = 500  # what was sent is part of some messages, and may be long
_MAX_COMMAS = 100_000  # of JSON; every value that is none of ours costs a kilobyte, and a body has room for millions
_OVERHEAD_BYTES = 64 * 1024  # of a body beside the image: question, field names, boundaries

_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {"schema": SifRequest.model_json_schema()},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image", "question"],
                "properties": {
                    "image": {"type": "string", "format": "binary"},
                    "question": {"type": "string"},
                    "model": {"type": "string"},
                },
            }
        },
    },
}
_REF = "#/components/schemas/{model}"
_CHAT_SCHEMA = ChatRequest.model_json_schema(ref_template=_REF)
_EVENT_SCHEMA = TypeAdapter(SifEvent | Refusal).json_schema(ref_template=_REF, mode="serialization")
_PARTS = _CHAT_SCHEMA.pop("$defs") | _EVENT_SCHEMA.pop("$defs")
_CHAT_BODY: dict[str, Any] = {"required": True, "content": {"application/json": {"schema": _CHAT_SCHEMA}}}
_SIF_REPLIES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The reply, or with `stream` server-sent events with it as the last. Their names in the order "
        f"of the schemas: {', '.join(EVENT_NAMES.values())}",
        "content": {"text/event-stream": {"schema": _EVENT_SCHEMA}},
    },
    **{status: {"model": Refusal} for status in (400, 401, 413, 415, 422, 429, 503, 504)},
}
_CHAT_REPLIES: dict[int | str, dict[str, Any]] = {
    200: {"description": "OpenAI's chat completion, or its chunks as server-sent events with `stream`"},
    **{status: {"model": Refusal} for status in (400, 401, 404, 413, 415, 422, 429, 503, 504)},
}

_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error", 504: "server_error"}

Asked = TypeVar("Asked", SifRequest, ChatRequest)
Event = TypeVar("Event")


async def _nothing_missing() -> list[str]:
    return []


def build_api(
    service: SifService,
    keys: Keys,
    *,
    missing: Callable[[], Awaitable[list[str]]] = _nothing_missing,
    observe: Callable[[RequestRecord], None] = lambda record: None,
) -> FastAPI:
    """The page at `/`; `POST /v1/sif`, `POST /v1/chat/completions` and `GET /v1/models`; `/healthz` and `/readyz`.

    `missing` names what requests would have to wait for; `observe` is told of every request that is over.
    """
    api = FastAPI(title="sif_ray", description="An image and a question in, a checked SIF trace out.")
    config, chats = service.config, ChatService(service)
    rate, places = Rate(config.rate_limit), Places(config.max_requests)
    api.add_middleware(Recorded, observe=observe)

    @api.exception_handler(RequestRefused)
    async def refuse(request: Request, error: RequestRefused) -> JSONResponse:
        return _problem(error.status, str(error), error.headers)

    @api.exception_handler(HTTPException)
    async def refuse_otherwise(request: Request, error: HTTPException) -> JSONResponse:
        return _problem(error.status_code, f"{request.method} {request.url.path}: {error.detail}", error.headers)

    @api.exception_handler(RequestValidationError)
    async def refuse_parameters(request: Request, error: RequestValidationError) -> JSONResponse:
        return _problem(422, _first_error(error.errors()))

    async def known(request: Request) -> str:
        holder = current().holder = keys.holder(request.headers.get("authorization", ""))
        return holder

    async def admitted(holder: str = Depends(known)) -> AsyncIterator[None]:
        """Held until the reply has been sent, streamed ones too."""
        rate.take(holder)
        with places.place():
            yield

    @api.post(
        "/v1/sif",
        response_model=SifResponse,
        responses=_SIF_REPLIES,
        openapi_extra={"requestBody": _BODY},
        dependencies=[Depends(admitted)],
    )
    async def sif(
        request: Request,
        stream: Annotated[bool, Query(description="send the reply as it is written, as server-sent events")] = False,
    ) -> SifResponse | Response:
        deadline = _Deadline(config.timeout_s)
        async with deadline.kept():
            asked = await _read_request(request, service)
            if not stream:
                return await service.answer(*asked)
            events = await service.stream(*asked)
        return _streamed(events, deadline, _sif_event)

    @api.post(
        "/v1/chat/completions",
        responses=_CHAT_REPLIES,
        openapi_extra={"requestBody": _CHAT_BODY},
        dependencies=[Depends(admitted)],
    )
    async def chat(request: Request) -> Response:
        deadline = _Deadline(config.timeout_s)
        async with deadline.kept():
            asked = await _read_chat(request, _max_chat_bytes(config))
            if not asked.stream:
                return _json(await chats.complete(asked))
            chunks = await chats.stream(asked)
        return _streamed(chunks, deadline, _chat_event, "data: [DONE]\n\n")

    @api.get("/v1/models", dependencies=[Depends(known)])
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model.to_dict() for model in chats.models()]}

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/readyz", responses={503: {"model": Refusal}})
    async def readyz() -> dict[str, str]:
        if names := await missing():
            raise RequestRefused(503, f"not ready: {', '.join(names)}", {"Retry-After": "1"})
        return {"status": "ok"}

    add_page(api, config)

    def describe() -> dict[str, Any]:
        described = FastAPI.openapi(api)
        described["components"]["schemas"] |= _PARTS
        return described

    api.openapi = describe  # type: ignore[method-assign]
    return api


def _problem(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(_refusal(status, message).model_dump(), status, headers)


def _refusal(status: int, message: str) -> Refusal:
    if len(message) > 2 * _MESSAGE_END_CHARS:
        message = f"{message[:_MESSAGE_END_CHARS]} ... {message[-_MESSAGE_END_CHARS:]}"
    return Refusal(error=Problem(message=message, type=_TYPES.get(status, "invalid_request_error")))


def _json(reply: OpenAiModel) -> Response:
    return Response(reply.to_json(indent=None), media_type="application/json")


class _Deadline:
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


def _streamed(
    events: AsyncGenerator[Event], deadline: _Deadline, write: Callable[[Event | Refusal], str], end: str = ""
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
                yield write(_refusal(error.status, str(error)))

    return StreamingResponse(written(), media_type="text/event-stream")


def _chat_event(event: ChatCompletionChunk | Refusal) -> str:
    """As OpenAI's clients read it."""
    body = event.model_dump_json() if isinstance(event, Refusal) else event.to_json(indent=None)
    return f"data: {body}\n\n"


def _sif_event(event: SifEvent | Refusal) -> str:
    return f"event: {EVENT_NAMES[type(event)]}\ndata: {event.model_dump_json()}\n\n"


def _max_chat_bytes(config: ServeConfig) -> int:
    """Of a body: images as base64, and every character as the longest escape of JSON."""
    return MAX_CHAT_IMAGES * 4 * config.max_image_bytes // 3 + 12 * config.max_question_chars + _OVERHEAD_BYTES


def _validated(kind: type[Asked], body: bytes) -> Asked:
    if body.count(b",") > _MAX_COMMAS:
        raise RequestRefused(413, f"the request has more than {_MAX_COMMAS} commas, so too many values")
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise RequestRefused(422, _first_error(error.errors(include_url=False, include_input=False))) from error


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _read_chat(request: Request, max_bytes: int) -> ChatRequest:
    if (kind := _content_type(request)) != "application/json":
        raise RequestRefused(415, f"content-type is {kind!r}; send application/json")
    return _validated(ChatRequest, await _read_body(request, max_bytes))


async def _read_request(request: Request, service: SifService) -> tuple[bytes, str, str]:
    """Encoded image, question and model of either form."""
    max_image_bytes = service.config.max_image_bytes
    kind = _content_type(request)
    if kind == "application/json":
        asked = _validated(SifRequest, await _read_body(request, 4 * max_image_bytes // 3 + _OVERHEAD_BYTES))
        return await service.load_image(asked.image), asked.question, asked.model
    if kind == "multipart/form-data":
        return await _read_form(request, await _read_body(request, max_image_bytes + _OVERHEAD_BYTES))
    raise RequestRefused(415, f"content-type is {kind!r}; send application/json or multipart/form-data")


async def _read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body, never holding more than `max_bytes` of it."""
    parts: list[bytes] = []
    size = 0
    if coding := request.headers.get("content-encoding"):
        raise RequestRefused(415, f"content-encoding is {coding!r}; send the request without one")
    try:
        async for part in request.stream():
            size += len(part)
            if size > max_bytes:
                raise RequestRefused(413, f"the request has more than {max_bytes} bytes; send a smaller image")
            parts.append(part)
    except ClientDisconnect as error:
        raise RequestRefused(400, "the client hung up before the request was whole") from error
    return b"".join(parts)


async def _read_form(request: Request, body: bytes) -> tuple[bytes, str, str]:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        async with Request(request.scope, receive).form(max_files=1, max_fields=2, max_part_size=len(body)) as form:
            image, question, model = form.get("image"), form.get("question"), form.get("model", "")
            if not isinstance(image, UploadFile):
                raise RequestRefused(422, "image: the form has no file of this name")
            if not isinstance(question, str):
                raise RequestRefused(422, "question: the form has no text field of this name")
            if not isinstance(model, str):
                raise RequestRefused(422, "model: is a file; send its name as text")
            return await image.read(), question, model
    except HTTPException as error:  # how Starlette reports a broken form
        raise RequestRefused(400, f"the form cannot be read: {error.detail}") from error
    except UnicodeError as error:
        raise RequestRefused(400, f"the form cannot be read: its charset does not fit: {error}") from error


def _first_error(errors: Sequence[Any]) -> str:
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"]) or "the request"
    return f"{where}: {first['msg']}"
