"""Images behind addresses, fetched from a real server on loopback, and from nowhere that is not allowed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from fastapi.testclient import TestClient
from serve_fakes import Policy, encoded, slope

from sif_ray.config import ConfigError, ServeConfig, load
from sif_ray.serve.access import Keys
from sif_ray.serve.api import build_api
from sif_ray.serve.service import SifService

MAX_BYTES = 10_000


class Images(BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path == "/moved.png":
            self.send_response(302)
            self.send_header("Location", "/photo.png")
            self.end_headers()
            return
        found = {"/photo.png": encoded(), "/page.html": b"<html>", "/large.png": encoded() + bytes(MAX_BYTES)}
        self.send_response(200 if self.path in found else 404)
        self.end_headers()
        self.wfile.write(found.get(self.path, b""))

    def log_message(self, *arguments: object) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def origin() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Images)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def policy() -> Policy:
    return Policy()


@pytest.fixture
def client(origin, policy) -> TestClient:
    config = ServeConfig(image_origins=[origin], max_image_bytes=MAX_BYTES)
    return TestClient(build_api(SifService(config, slope, policy), Keys({})))


def test_an_image_is_fetched_for_both_interfaces(client, origin, policy):
    reply = client.post("/v1/sif", json={"image": f"{origin}/photo.png", "question": "?"})
    assert reply.json()["answer"] == "red ball"
    image = {"type": "image_url", "image_url": {"url": f"{origin}/photo.png"}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "?"}]}]
    for model in ("sif", "sif-plain"):
        assert client.post("/v1/chat/completions", json={"model": model, "messages": messages}).status_code == 200
    assert [asked.images[0] for asked in policy.seen] == [encoded()] * 3


@pytest.mark.parametrize(
    ("path", "status", "word"),
    [
        ("/nothing.png", 400, "answers 404"),
        ("/moved.png", 400, "answers 302"),
        ("/page.html", 400, "none of PNG"),
        ("/large.png", 413, "more than 10000 bytes"),
    ],
)
def test_what_is_no_image_there_is_refused(client, origin, path, status, word):
    reply = client.post("/v1/sif", json={"image": origin + path, "question": "?"})
    assert (reply.status_code, word in reply.json()["error"]["message"]) == (status, True), reply.text


@pytest.mark.parametrize(
    "rest",
    [
        "http://127.0.0.1:1/photo.png",  # another port
        "http://localhost:{port}/photo.png",  # another name
        "https://127.0.0.1:{port}/photo.png",
        "http://user@127.0.0.1:{port}/photo.png",
        "http://127.0.0.1:{port}@example.org/photo.png",
        "http://127.0.0.1:{port}.example.org/photo.png",
        "file:///photo.png",
        "http:127.0.0.1:{port}/photo.png",
        "http://[::1",
    ],
)
def test_other_origins_are_not_asked(client, origin, rest):
    Images.asked.clear()
    address = rest.format(port=origin.rpartition(":")[2])
    reply = client.post("/v1/sif", json={"image": address, "question": "?"})
    assert (reply.status_code, "address" in reply.json()["error"]["message"]) == (400, True), reply.text
    assert not Images.asked


def test_a_server_that_is_gone_is_a_refusal(policy):
    config = ServeConfig(image_origins=["http://127.0.0.1:1"])
    reply = TestClient(build_api(SifService(config, slope, policy), Keys({}))).post(
        "/v1/sif", json={"image": "http://127.0.0.1:1/photo.png", "question": "?"}
    )
    assert (reply.status_code, "cannot be read" in reply.text) == (400, True)


@pytest.mark.parametrize("origin", ["example.org", "https://example.org/images", "ftp://example.org", "https://a@b"])
def test_an_origin_that_is_none_is_refused_at_the_start(origin):
    with pytest.raises(ConfigError, match="image_origins"):
        load("serve", None, [f"image_origins=['{origin}']"])
