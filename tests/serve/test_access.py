"""Keys, rates, places and deadlines, at the HTTP interface: no Ray, no models."""

from __future__ import annotations

import asyncio
import base64
import json

import httpx
import pytest
from fastapi.testclient import TestClient
from serve_fakes import Policy, encoded, slope

from sif_ray.config import ConfigError, ServeConfig
from sif_ray.serve.access import Keys
from sif_ray.serve.api import build_api
from sif_ray.serve.backends import Ask
from sif_ray.serve.service import SifService

ALICE, BOB = {"Authorization": "Bearer a-key"}, {"Authorization": "bearer b-key"}


class Slow(Policy):
    """Answers when it is let; the first part of a stream comes at once."""

    def __init__(self) -> None:
        super().__init__()
        self.free = asyncio.Event()
        self.waiting = 0
        self.cancelled = 0

    async def generate(self, ask: Ask):
        await self._wait()
        return await super().generate(ask)

    async def stream(self, ask: Ask):
        parts = [part async for part in Policy().stream(ask)]
        yield parts[0]
        await self._wait()
        for part in parts[1:]:
            yield part

    async def _wait(self) -> None:
        self.waiting += 1
        try:
            await self.free.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def api(policy: Policy, **settings):
    config = ServeConfig(**settings)
    return build_api(SifService(config, slope, policy), Keys.read(config))


def connect(app) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=30)


def chat(stream: bool = False) -> dict:
    url = "data:image/png;base64," + base64.b64encode(encoded()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is red?"}]
    return {"model": "sif", "messages": [{"role": "user", "content": content}], "stream": stream}


@pytest.fixture
def two_keys(tmp_path) -> str:
    path = tmp_path / "keys"
    path.write_text("# people\nalice: a-key\n\nbob: b-key\n")
    return str(path)


def test_only_known_keys_may_ask(two_keys, monkeypatch):
    monkeypatch.setenv("MORE_KEYS", "carol: c:key")
    client = TestClient(api(Policy(), api_keys_file=two_keys, api_keys_env="MORE_KEYS"))
    for headers in (ALICE, BOB, {"Authorization": "Bearer c:key"}):
        assert client.post("/v1/chat/completions", json=chat(), headers=headers).status_code == 200
        assert client.get("/v1/models", headers=headers).status_code == 200
    for headers in ({}, {"Authorization": "Bearer a-ke"}, {"Authorization": "Basic a-key"}, {"Authorization": "a-key"}):
        for call in (client.get("/v1/models", headers=headers), client.post("/v1/sif", headers=headers)):
            assert call.status_code == 401
            assert call.headers["www-authenticate"] == "Bearer"
            assert "Authorization: Bearer KEY" in call.json()["error"]["message"]
            assert call.json()["error"]["type"] == "authentication_error"
    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "holds no key"),
        ("# nobody", "holds no key"),
        ("a-key", "line 1"),
        ("a: 1\na: 2", "line 2 names 'a' again"),
        ("a: clé", "beyond ASCII"),
    ],
)
def test_keys_that_cannot_be_read_are_refused_before_anything_starts(tmp_path, text, word):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError, match=word) as refused:
        Keys.read(ServeConfig(api_keys_file=str(tmp_path / "keys")))
    assert "a-key" not in str(refused.value).replace("api_keys", "")
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys.read(ServeConfig(api_keys_file=str(tmp_path / "missing")))
    with pytest.raises(ConfigError, match=r"NOT_THERE.*not set"):
        Keys.read(ServeConfig(api_keys_env="NOT_THERE"))


def test_every_holder_has_a_rate_of_its_own(two_keys):
    client = TestClient(api(Policy(), api_keys_file=two_keys, rate_limit="3/minute"))

    def ask(headers):
        return client.post("/v1/chat/completions", json=chat(), headers=headers)

    assert [ask(ALICE).status_code for _ in range(4)] == [200, 200, 200, 429]
    refused = ask(ALICE)
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert "alice: more than 3 per 1 minute" in refused.json()["error"]["message"]
    assert ask(BOB).status_code == 200
    assert client.get("/v1/models", headers=ALICE).status_code == 200  # looking costs nothing


@pytest.mark.parametrize("stream", [False, True])
def test_more_than_fit_are_told_to_come_again_and_the_others_are_answered(stream):
    async def run():
        policy = Slow()
        async with connect(api(policy, max_requests=3)) as client:

            async def ask() -> httpx.Response:
                return await client.post("/v1/chat/completions", json=chat(stream))

            inside = [asyncio.ensure_future(ask()) for _ in range(3)]
            while policy.waiting < 3:
                await asyncio.sleep(0.001)
            for _ in range(20):
                refused = await ask()
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
                assert "3 requests are under way" in refused.json()["error"]["message"]
            policy.free.set()
            assert [(await reply).status_code for reply in inside] == [200] * 3
            assert (await ask()).status_code == 200

    asyncio.run(run())


def test_a_place_is_taken_before_a_body_is_read():
    async def run():
        policy = Slow()
        app = api(policy, max_requests=1)
        async with connect(app) as client:
            inside = asyncio.ensure_future(client.post("/v1/chat/completions", json=chat()))
            while not policy.waiting:
                await asyncio.sleep(0.001)

            async def endless():
                yield b"{"
                raise AssertionError("the body was read")

            refused = await client.post("/v1/sif", content=endless())
            assert refused.status_code == 503
            policy.free.set()
            await inside

    asyncio.run(run())


def test_what_takes_too_long_ends_where_it_is_written():
    async def run():
        policy = Slow()
        async with connect(api(policy, timeout_s=0.2)) as client:
            reply = await client.post("/v1/chat/completions", json=chat())
            assert reply.status_code == 504
            assert "0.2 s (timeout_s)" in reply.json()["error"]["message"]
            streamed = await client.post("/v1/chat/completions", json=chat(stream=True))
            events = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line]
            assert json.loads(events[0])["choices"][0]["delta"]["role"] == "assistant"
            assert "(timeout_s)" in json.loads(events[-1])["error"]["message"]
        assert policy.cancelled == 2

    asyncio.run(run())
