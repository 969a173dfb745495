"""A client of the endpoint with nothing but the standard library."""

from __future__ import annotations

import urllib.request

from sif_ray.serve.protocol import SifRequest, SifResponse


def ask(base_url: str, image: bytes, question: str, timeout_s: float = 300.0, api_key: str = "") -> SifResponse:
    """Send an encoded image and a question, e.g. `ask("http://127.0.0.1:8000", png, "Which is closer, ...?")`.

    Raises `urllib.error.HTTPError` for a refused request; its body says why.
    """
    request = urllib.request.Request(
        f"{base_url}/v1/sif",
        data=SifRequest.of(image, question).model_dump_json().encode(),
        headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {}),
    )
    with urllib.request.urlopen(request, timeout=timeout_s) as reply:
        return SifResponse.model_validate_json(reply.read())
