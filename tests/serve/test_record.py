"""The record of every request: what logs and metrics are made of, and that no content is in it."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

import pytest
from fastapi.testclient import TestClient
from serve_fakes import Policy, encoded, slope

from sif_ray.config import ServeConfig
from sif_ray.serve.access import Keys
from sif_ray.serve.api import build_api
from sif_ray.serve.protocol import SifRequest
from sif_ray.serve.record import HUNG_UP, NO_ROUTE, RequestRecord
from sif_ray.serve.service import SifService

SECRET = "the secret question"
HEADERS = {"Authorization": "Bearer sk-secret"}


@pytest.fixture
def records() -> list[RequestRecord]:
    return []


@pytest.fixture
def client(records) -> TestClient:
    api = build_api(SifService(ServeConfig(), slope, Policy()), Keys({"alice": "sk-secret"}), observe=records.append)
    return TestClient(api)


def ask(client: TestClient, path: str = "/v1/sif", **changes) -> RequestRecord:
    body = SifRequest.of(encoded(), SECRET).model_dump() | changes
    return client.post(path, json=body, headers=HEADERS)


@pytest.mark.parametrize("path", ["/v1/sif", "/v1/sif?stream=1"])
def test_an_answer_has_sizes_times_and_outcome(client, records, path):
    reply = ask(client, path)
    [record] = records
    assert (record.method, record.route, record.holder, record.model) == ("POST", "/v1/sif", "alice", "sif")
    assert (record.status, record.valid, record.policy_version, record.finish_reason) == (200, True, 7, "stop")
    assert record.prompt_tokens == 30
    assert record.tokens > 100
    assert record.body_bytes == int(reply.request.headers["content-length"])
    assert 0 <= record.depth_s <= record.seconds
    assert 0 <= record.generate_s <= record.seconds
    assert (record.first_token_s is not None) == ("stream" in path)
    told = str(asdict(record))
    assert SECRET not in told
    assert "sk-secret" not in told
    assert "red ball" not in told


def test_a_chat_is_counted_as_it_is_told(client, records):
    content = [
        {"type": "text", "text": SECRET},
        {"type": "image_url", "image_url": {"url": SifRequest.of(encoded(), "").image}},
    ]
    body = {"model": "sif-plain", "messages": [{"role": "user", "content": content}]}
    usage = client.post("/v1/chat/completions", json=body, headers=HEADERS).json()["usage"]
    [record] = records
    assert (record.route, record.model, record.valid) == ("/v1/chat/completions", "sif-plain", None)
    assert (record.prompt_tokens, record.tokens) == (usage["prompt_tokens"], usage["completion_tokens"])


@pytest.mark.parametrize(
    ("changes", "status", "model"),
    [({"model": SECRET}, 404, ""), ({"question": " "}, 422, "sif"), ({"image": "***"}, 400, "")],
)
def test_a_refusal_keeps_what_was_sent_to_itself(client, records, changes, status, model):
    ask(client, **changes)
    [record] = records
    assert (record.status, record.model, record.holder, record.tokens) == (status, model, "alice", 0)


def test_addresses_that_do_not_exist_are_one_route(client, records):
    client.get("/v1/nothing")
    client.get("/healthz")
    assert [(record.route, record.status) for record in records] == [(NO_ROUTE, 404), ("/healthz", 200)]


async def test_who_hangs_up_is_recorded_as_such():
    records: list[RequestRecord] = []
    api = build_api(SifService(ServeConfig(), slope, Policy()), Keys({}), observe=records.append)

    async def never() -> dict:
        await asyncio.sleep(3600)
        return {}

    async def send(message) -> None:
        raise AssertionError(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/sif", "raw_path": b"/v1/sif", "root_path": "", "scheme": "http",
        "query_string": b"", "headers": [(b"content-type", b"application/json")], "server": ("test", 80),
        "client": ("test", 1), "http_version": "1.1", "asgi": {"version": "3.0"},
    }  # fmt: skip
    task = asyncio.create_task(api(scope, never, send))
    await asyncio.sleep(0.1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    [record] = records
    assert (record.status, record.route) == (HUNG_UP, "/v1/sif")
