"""The HTTP interface of a `SifService`: two routes, a bounded body, and a clear 4xx for everything that is wrong."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from sif_ray.serve.images import RequestRefused, decode_base64
from sif_ray.serve.protocol import Refusal, SifRequest, SifResponse
from sif_ray.serve.service import SifService

_OVERHEAD_BYTES = 64 * 1024  # of a body beside the image: question, field names, boundaries

_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {"schema": SifRequest.model_json_schema()},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image", "question"],
                "properties": {"image": {"type": "string", "format": "binary"}, "question": {"type": "string"}},
            }
        },
    },
}
_REFUSALS: dict[int | str, dict[str, Any]] = {status: {"model": Refusal} for status in (400, 413, 415, 422)}


def build_api(service: SifService) -> FastAPI:
    """`POST /v1/sif` (JSON or multipart) and `GET /healthz`."""
    api = FastAPI(title="sif_ray", description="An image and a question in, a checked SIF trace out.")

    @api.exception_handler(RequestRefused)
    async def refuse(request: Request, error: RequestRefused) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=error.status)

    @api.post("/v1/sif", responses=_REFUSALS, openapi_extra={"requestBody": _BODY})
    async def sif(request: Request) -> SifResponse:
        image, question = await _read_request(request, service.config.max_image_bytes)
        return await service.answer(image, question)

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    return api


async def _read_request(request: Request, max_image_bytes: int) -> tuple[bytes, str]:
    """Encoded image and question of either form."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        body = await _read_body(request, 4 * max_image_bytes // 3 + _OVERHEAD_BYTES)
        try:
            asked = SifRequest.model_validate_json(body)
        except ValidationError as error:
            raise RequestRefused(422, _first_error(error)) from error
        return decode_base64(asked.image), asked.question
    if kind == "multipart/form-data":
        return await _read_form(request, await _read_body(request, max_image_bytes + _OVERHEAD_BYTES))
    raise RequestRefused(415, f"content-type is {kind!r}; send application/json or multipart/form-data")


async def _read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body, never holding more than `max_bytes` of it."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise RequestRefused(413, f"the request has more than {max_bytes} bytes; send a smaller image")
        parts.append(part)
    return b"".join(parts)


async def _read_form(request: Request, body: bytes) -> tuple[bytes, str]:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        async with Request(request.scope, receive).form(
            max_files=1, max_fields=1, max_part_size=_OVERHEAD_BYTES
        ) as form:
            image, question = form.get("image"), form.get("question")
            if not isinstance(image, UploadFile):
                raise RequestRefused(422, "image: the form has no file of this name")
            if not isinstance(question, str):
                raise RequestRefused(422, "question: the form has no text field of this name")
            return await image.read(), question
    except HTTPException as error:  # how Starlette reports a broken form
        raise RequestRefused(400, f"the form cannot be read: {error.detail}") from error


def _first_error(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the request"
    return f"{where}: {first['msg']}"
