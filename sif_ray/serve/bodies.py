"""Bodies of requests: bounded before they are read, checked before they are used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from sif_ray.config import ServeConfig
from sif_ray.serve.chat import MAX_CHAT_IMAGES
from sif_ray.serve.protocol import ChatRequest, SifRequest
from sif_ray.serve.refusal import RequestRefused
from sif_ray.serve.service import SifService

_MAX_COMMAS = 100_000  # of JSON; every value that is none of ours costs a kilobyte, and a body has room for millions
_OVERHEAD_BYTES = 64 * 1024  # of a body beside the image: question, field names, boundaries

Asked = TypeVar("Asked", SifRequest, ChatRequest)


async def read_chat(request: Request, config: ServeConfig) -> ChatRequest:
    """The chat of a request. Raises `RequestRefused`."""
    if (kind := _content_type(request)) != "application/json":
        raise RequestRefused(415, f"content-type is {kind!r}; send application/json")
    return _validated(ChatRequest, await _read_body(request, _max_chat_bytes(config)))


async def read_question(request: Request, service: SifService) -> tuple[bytes, str, str]:
    """Encoded image, question and model of a request in either form. Raises `RequestRefused`."""
    max_image_bytes = service.config.max_image_bytes
    kind = _content_type(request)
    if kind == "application/json":
        asked = _validated(SifRequest, await _read_body(request, 4 * max_image_bytes // 3 + _OVERHEAD_BYTES))
        return await service.load_image(asked.image), asked.question, asked.model
    if kind == "multipart/form-data":
        return await _read_form(request, await _read_body(request, max_image_bytes + _OVERHEAD_BYTES))
    raise RequestRefused(415, f"content-type is {kind!r}; send application/json or multipart/form-data")


def first_error(errors: Sequence[Any]) -> str:
    """What pydantic found first: where, and what."""
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"]) or "the request"
    return f"{where}: {first['msg']}"


def _max_chat_bytes(config: ServeConfig) -> int:
    """Of a body: images as base64, and every character as the longest escape of JSON."""
    return MAX_CHAT_IMAGES * 4 * config.max_image_bytes // 3 + 12 * config.max_question_chars + _OVERHEAD_BYTES


def _validated(kind: type[Asked], body: bytes) -> Asked:
    if body.count(b",") > _MAX_COMMAS:
        raise RequestRefused(413, f"the request has more than {_MAX_COMMAS} commas, so too many values")
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise RequestRefused(422, first_error(error.errors(include_url=False, include_input=False))) from error


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


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
            return await _read_fields(form)
    except HTTPException as error:  # how Starlette reports a broken form
        raise RequestRefused(400, f"the form cannot be read: {error.detail}") from error
    except UnicodeError as error:
        raise RequestRefused(400, f"the form cannot be read: its charset does not fit: {error}") from error


async def _read_fields(form: FormData) -> tuple[bytes, str, str]:
    fields = dict(form.multi_items())
    if unknown := fields.keys() - {"image", "question", "model"}:
        raise RequestRefused(422, f"{min(unknown)}: the form has no such field; there are image, question and model")
    if len(fields) < len(form.multi_items()):
        raise RequestRefused(422, "the form has a field twice; send each once")
    image, question, model = fields.get("image"), fields.get("question"), fields.get("model", "")
    if not isinstance(image, UploadFile):
        raise RequestRefused(422, "image: the form has no file of this name")
    if not isinstance(question, str):
        raise RequestRefused(422, "question: the form has no text field of this name")
    if not isinstance(model, str):
        raise RequestRefused(422, "model: is a file; send its name as text")
    return await image.read(), question, model
