"""The page at `/`: its files, and headers under which a browser takes nothing from anywhere else for it."""

from __future__ import annotations

import json
from pathlib import Path
from string import Template
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

from sif_ray.config import ServeConfig
from sif_ray.method.trace import EXPLANATIONS

FOLDER = Path(__file__).parent / "page"
HEADERS = {
    "Cache-Control": "no-cache",  # asked for again, so that files of two versions never meet
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class _Files(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response


def add_page(api: FastAPI, config: ServeConfig) -> None:
    """`GET /` with the limits of the server in it, and what it loads below `/page`."""
    settings = {
        "max_image_bytes": config.max_image_bytes,
        "max_question_chars": config.max_question_chars,
        "explanations": EXPLANATIONS,
    }
    inside_a_tag = json.dumps(settings).replace("<", "\\u003c")
    html = Template((FOLDER / "index.html").read_text()).substitute(settings=inside_a_tag)

    @api.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers=HEADERS)

    api.mount("/page", _Files(directory=FOLDER))
