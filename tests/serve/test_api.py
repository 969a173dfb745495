"""The HTTP contract around a plain service: no Ray, no models, but the real reader of traces and images."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from serve_fakes import TRACE, Policy, encoded, slope

from sif_ray.config import ServeConfig
from sif_ray.method import depth_code
from sif_ray.serve.access import Keys
from sif_ray.serve.api import build_api
from sif_ray.serve.protocol import SifRequest
from sif_ray.serve.service import SifService


@pytest.fixture
def policy() -> Policy:
    return Policy()


@pytest.fixture
def client(policy: Policy) -> TestClient:
    config = ServeConfig(max_image_bytes=100_000, max_image_pixels=64 * 64, max_question_chars=100)
    return TestClient(build_api(SifService(config, slope, policy), Keys({})), raise_server_exceptions=True)


def ask(client: TestClient, image: bytes, question="What is red?"):
    return client.post("/v1/sif", json=SifRequest.of(image, question).model_dump())


def test_json_request_is_answered_with_trace_and_depth(client, policy):
    image = encoded()
    reply = ask(client, image)
    assert reply.status_code == 200
    body = reply.json()
    assert (body["answer"], body["valid"], body["reasons"], body["policy_version"]) == ("red ball", True, [], 7)
    assert body["text"] == TRACE
    assert body["steps"][1] == {
        "boxes": [{"bbox_xyxy_norm": [0.1, 0.2, 0.3, 0.4], "depth": 0.25}],
        "text": "Here is the red ball.",
    }
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(body["depth_image"]))).convert("RGB"))
    assert np.abs(depth_code.decode(shown) - np.linspace(0, 1, 40)).max() <= 0.5 / 255 + 1e-9
    [asked] = policy.seen
    assert asked.question == "What is red?"
    assert asked.images == (image, base64.b64decode(body["depth_image"]))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_multipart_upload_is_the_same_request(client, policy, form):
    image = encoded(form=form)
    reply = client.post("/v1/sif", files={"image": ("photo", image)}, data={"question": "What is red?"})
    assert reply.status_code == 200
    assert policy.seen[0].images[0] == image


def test_data_url_is_accepted(client, policy):
    image = encoded()
    url = "data:image/png;base64," + base64.b64encode(image).decode()
    assert client.post("/v1/sif", json={"image": url, "question": "?"}).status_code == 200
    assert policy.seen[0].images[0] == image


def test_turned_photograph_is_shown_upright(client, policy):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    assert ask(client, encoded((40, 30), "JPEG", exif=exif)).status_code == 200
    rgb, depth = (Image.open(io.BytesIO(image)) for image in policy.seen[0].images)
    assert rgb.size == depth.size == (30, 40)


def test_output_that_is_no_trace_is_told_with_its_reasons(client, policy):
    policy.text = (
        '<think><area>[{"bbox_2d":[0.1,0.2,0.3,0.4],"depth":2}, {"bbox_2d":[0,0,9,9],"depth":0}]</area></think>'
    )
    body = ask(client, encoded()).json()
    assert not body["valid"]
    assert {"no_answer", "depth_out_of_range", "tag_order"} <= set(body["reasons"])
    assert body["answer"] is None
    assert body["steps"] == [{"boxes": [{"bbox_xyxy_norm": [0.1, 0.2, 0.3, 0.4], "depth": 2.0}], "text": ""}]


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("image", "status", "word"),
    [
        (b"", 400, "empty"),
        (b"no image at all", 400, "none of PNG"),
        (encoded()[:60], 400, "decoded"),
        (encoded(form="GIF"), 400, "none of PNG"),
        (encoded((65, 64)), 413, "65 x 64 pixels"),
        (encoded((81, 10)), 422, "at most 8 times"),
        (bomb(60_000, 60_000), 413, "pixels|too large"),
        (bomb(9_000, 9_000), 413, "9000 x 9000 pixels"),
        (encoded() + b"\0" * 100_000, 413, "bytes"),
    ],
    ids=["empty", "text", "cut", "gif", "pixels", "strip", "bomb", "smaller bomb", "bytes"],
)
def test_refused_images(client, policy, image, status, word):
    for reply in (
        ask(client, image),
        client.post("/v1/sif", files={"image": ("photo", image)}, data={"question": "?"}),
    ):
        assert reply.status_code == status
        assert any(part in reply.json()["error"]["message"] for part in word.split("|"))
    assert not policy.seen


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"image": "http://example.org/cat.png", "question": "?"}, 400, "addresses are not fetched"),
        ({"image": "data:image/png,abc", "question": "?"}, 400, ";base64,"),
        ({"image": "***", "question": "?"}, 400, "base64"),
        ({"image": "äöü", "question": "?"}, 400, "base64"),
        ({"question": "?"}, 422, "image"),
        ({"image": 3, "question": "?"}, 422, "image"),
        ({"image": "AAAA", "question": "?", "model": "x"}, 404, "there are sif"),
        ({"image": base64.b64encode(encoded()).decode(), "question": "  "}, 422, "blank"),
        ({"image": base64.b64encode(encoded()).decode(), "question": "x" * 101}, 413, "101 characters"),
        ({"image": base64.b64encode(encoded()).decode(), "question": "too long"}, 422, "leaves no room"),
        ([], 422, "request"),
    ],
)
def test_refused_json(client, body, status, word):
    reply = client.post("/v1/sif", json=body)
    assert (reply.status_code, word in reply.json()["error"]["message"]) == (status, True), reply.text


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 422),
        (b"\xff\xfe", "application/json", 422),
        (b"[" * 50_000, "application/json", 422),
        (b'{"image": "AAAA", "question": "\\ud800"}', "application/json", 422),
        (b"hello", "text/plain", 415),
        (b"hello", "multipart/form-data", 400),
        (b"hello", "multipart/form-data; boundary=x", 400),
        (b"", "multipart/form-data; boundary=x", 422),
        (b"--x\r\n\r\n--x--", "multipart/form-data; boundary=x", 400),
        (b"x" * 1_000_000, "application/json", 413),
        (b"x" * 1_000_000, "multipart/form-data; boundary=x", 413),
    ],
)
def test_refused_bodies(client, content, kind, status):
    reply = client.post("/v1/sif", content=content, headers={"content-type": kind})
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["message"]


def test_form_with_a_text_for_image_or_without_question_is_refused(client):
    assert client.post("/v1/sif", data={"image": "x", "question": "?"}, files={"other": b""}).status_code in (400, 422)
    reply = client.post("/v1/sif", files={"image": ("photo", encoded())})
    assert (reply.status_code, "question" in reply.json()["error"]["message"]) == (422, True)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_images_are_never_a_server_error(client, data):
    image = bytearray(encoded(form=data.draw(st.sampled_from(["PNG", "JPEG", "WEBP"]))))
    for position in data.draw(st.lists(st.integers(0, len(image) - 1), min_size=1, max_size=8)):
        image[position] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(image)))
    for sent in (bytes(image), bytes(image[:cut])):
        assert ask(client, sent).status_code in (200, 400, 413, 422)


def test_body_is_not_read_beyond_the_limit():
    """The stream is dropped as soon as it is too long: a client cannot fill the memory."""
    import asyncio

    service = SifService(ServeConfig(max_image_bytes=1000), slope, Policy())
    sent = 0

    async def receive():
        nonlocal sent
        sent += 50_000
        return {"type": "http.request", "body": b"x" * 50_000, "more_body": True}

    replies = []

    async def send(message):
        replies.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/sif", "raw_path": b"/v1/sif", "root_path": "", "scheme": "http",
        "query_string": b"", "headers": [(b"content-type", b"application/json")], "server": ("test", 80),
        "client": ("test", 1), "http_version": "1.1", "asgi": {"version": "3.0"},
    }  # fmt: skip
    asyncio.run(build_api(service, Keys({}))(scope, receive, send))
    assert replies[0]["status"] == 413
    assert sent <= 200_000


def test_the_steps_are_drawn_where_it_is_asked_for(client, policy):
    asked = {"json": SifRequest.of(encoded(), "What is red?").model_dump()}
    assert client.post("/v1/sif", **asked).json()["overlay_image"] is None
    reply = client.post("/v1/sif?overlay=1", **asked).json()
    alone = client.post("/v1/sif?overlay=1", headers={"accept": "image/jpeg"}, **asked)
    assert alone.headers["content-type"] == "image/jpeg"
    assert base64.b64decode(reply["overlay_image"]) == alone.content
    drawn = np.asarray(Image.open(io.BytesIO(alone.content)).convert("RGB")).astype(int)
    second = drawn[288 + _caption_px(drawn) :][
        :288, :384
    ]  # photo of the second step, 40 x 30 pixels shown as 384 x 288
    inside, outside = second[86, 77], second[230, 300]
    assert inside == pytest.approx([200, 30, 30], abs=12)
    assert outside == pytest.approx([116, 17, 17], abs=12)
    policy.text = "<area>[]</area>" * 500
    assert client.post("/v1/sif?overlay=1", **asked).status_code == 200


def _caption_px(drawn: np.ndarray) -> int:
    """Height of the strip of paper below the first pair."""
    paper = (drawn[288:, 760] > 240).all(axis=-1)
    return int(np.argmin(paper))


def test_ready_is_what_has_all_its_parts(policy):
    parts: list[str] = ["Policy"]

    async def missing() -> list[str]:
        return parts

    client = TestClient(build_api(SifService(ServeConfig(), slope, policy), Keys({}), missing=missing))
    reply = client.get("/readyz")
    assert (reply.status_code, "not ready: Policy" in reply.text, "retry-after" in reply.headers) == (503, True, True)
    parts.clear()
    assert client.get("/readyz").json() == {"status": "ok"}


def test_health_and_description(client):
    assert client.get("/healthz").json() == {"status": "ok"}
    described = client.get("/openapi.json").json()["paths"]["/v1/sif"]["post"]
    assert set(described["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    assert "SifResponse" in json.dumps(described["responses"]["200"])
