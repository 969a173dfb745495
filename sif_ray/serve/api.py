"""The HTTP interface of a `SifService`: bounded bodies, and a clear 4xx for everything that is wrong."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from openai import BaseModel as OpenAiModel
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from sif_ray.serve.access import Keys, Places, Rate
from sif_ray.serve.bodies import first_error, read_chat, read_question
from sif_ray.serve.chat import ChatService
from sif_ray.serve.events import Deadline, chat_event, sif_event, streamed
from sif_ray.serve.page_files import add_page
from sif_ray.serve.protocol import EVENT_NAMES, ChatRequest, Refusal, SifRequest, SifResponse
from sif_ray.serve.record import Recorded, RequestRecord, current
from sif_ray.serve.refusal import RequestRefused, refusal
from sif_ray.serve.service import SifService

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
_SCHEMAS, _PARTS = models_json_schema(
    [
        (ChatRequest, "validation"),
        *((kind, "serialization") for kind in (*EVENT_NAMES, ChatCompletion, ChatCompletionChunk)),
    ],
    ref_template="#/components/schemas/{model}",
)


def _event(kind: type[BaseModel], name: str = "") -> dict[str, Any]:
    """The schema of a server-sent event with JSON in its data."""
    named = {"event": {"const": name}} if name else {}
    content = _SCHEMAS[kind, "serialization"]
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": content}
    return {"type": "object", "required": [*named, "data"], "properties": {**named, "data": data}}


_EVENT_SCHEMA = {"anyOf": [_event(kind, name) for kind, name in EVENT_NAMES.items()]}
_LAST_CHUNK = {"type": "object", "required": ["data"], "properties": {"data": {"const": "[DONE]"}}}
_CHUNK_SCHEMA = {"anyOf": [_event(ChatCompletionChunk), _event(Refusal), _LAST_CHUNK]}
_CHAT_BODY: dict[str, Any] = {
    "required": True,
    "content": {"application/json": {"schema": _SCHEMAS[ChatRequest, "validation"]}},
}
_STATUSES = (400, 401, 404, 413, 415, 422, 429, 503, 504)
_SIF_REPLIES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The reply, or with `stream` server-sent events with it as the last",
        "content": {"text/event-stream": {"schema": _EVENT_SCHEMA}},
    },
    **{status: {"model": Refusal} for status in _STATUSES},
}
_CHAT_REPLIES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "OpenAI's chat completion, or its chunks as server-sent events with `stream`",
        "content": {
            "application/json": {"schema": _SCHEMAS[ChatCompletion, "serialization"]},
            "text/event-stream": {"schema": _CHUNK_SCHEMA},
        },
    },
    **{status: {"model": Refusal} for status in _STATUSES},
}


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
        return _problem(422, first_error(error.errors()))

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
        overlay: Annotated[
            bool, Query(description="draw the steps too; `Accept: image/jpeg` asks for the drawing alone")
        ] = False,
    ) -> SifResponse | Response:
        deadline = Deadline(config.timeout_s)
        async with deadline.kept():
            asked = await read_question(request, service)
            if not stream:
                reply = await service.answer(*asked, overlay=overlay)
                alone = reply.overlay_image if request.headers.get("accept") == "image/jpeg" else None
                return reply if alone is None else Response(base64.b64decode(alone), media_type="image/jpeg")
            events = await service.stream(*asked, overlay=overlay)
        return streamed(events, deadline, sif_event)

    @api.post(
        "/v1/chat/completions",
        responses=_CHAT_REPLIES,
        openapi_extra={"requestBody": _CHAT_BODY},
        dependencies=[Depends(admitted)],
    )
    async def chat(request: Request) -> Response:
        deadline = Deadline(config.timeout_s)
        async with deadline.kept():
            asked = await read_chat(request, config)
            if not asked.stream:
                return _json(await chats.complete(asked))
            chunks = await chats.stream(asked)
        return streamed(chunks, deadline, chat_event, "data: [DONE]\n\n")

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
        described["components"]["schemas"] |= _PARTS["$defs"]
        return described

    api.openapi = describe  # type: ignore[method-assign]
    return api


def _problem(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(refusal(status, message).model_dump(), status, headers)


def _json(reply: OpenAiModel) -> Response:
    return Response(reply.to_json(indent=None), media_type="application/json")
