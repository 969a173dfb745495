"""Images that requests name by address: fetched only from where the server's owner allows it."""

from __future__ import annotations

import re
from collections.abc import Collection

import httpx

from sif_ray.serve.refusal import RequestRefused

ADDRESS = re.compile(r"(?!data:)[a-z][a-z0-9+.-]*:", re.IGNORECASE)  # base64 has no colon
TIMEOUT_S = 20.0


class Addresses:
    """Fetches images from some origins, e.g. "https://img.example.org", and from nowhere else: redirects are not
    followed, the environment's proxies and credentials are not used.

    Example: `await Addresses(["https://img.example.org"], 20_000_000).fetch("https://img.example.org/cat.jpg")`.
    """

    def __init__(self, origins: Collection[str], max_bytes: int) -> None:
        self._origins = [_origin(httpx.URL(origin)) for origin in origins]
        self._max_bytes = max_bytes

    async def fetch(self, address: str) -> bytes:
        """The bytes behind an address. Raises `RequestRefused`."""
        if not self._origins:
            raise RequestRefused(400, "image is an address; addresses are not fetched, send the image itself as base64")
        url = _parsed(address)
        if url.userinfo or _origin(url) not in self._origins:
            raise RequestRefused(
                400,
                f"image is an address outside {', '.join(map(str, self._origins))}; send the image itself as base64",
            )
        try:
            async with (
                httpx.AsyncClient(trust_env=False, timeout=TIMEOUT_S) as client,
                client.stream("GET", url) as reply,
            ):
                if reply.status_code != 200:
                    raise RequestRefused(400, f"image: its address answers {reply.status_code}, not 200")
                return await self._read(reply)
        except httpx.HTTPError as error:
            raise RequestRefused(400, f"image: its address cannot be read: {type(error).__name__}") from error

    async def _read(self, reply: httpx.Response) -> bytes:
        image = bytearray()
        async for part in reply.aiter_bytes():
            image += part
            if len(image) > self._max_bytes:
                raise RequestRefused(413, f"image: its address has more than {self._max_bytes} bytes")
        return bytes(image)


def _parsed(address: str) -> httpx.URL:
    try:
        return httpx.URL(address)
    except httpx.InvalidURL as error:
        raise RequestRefused(400, f"image is no address that can be read: {error}") from error


def _origin(url: httpx.URL) -> httpx.URL:
    """Scheme, host and port, in one spelling: no default port, lower case."""
    return httpx.URL(scheme=url.scheme, host=url.host, port=url.port)
