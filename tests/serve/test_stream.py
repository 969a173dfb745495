"""`POST /v1/sif?stream=1`: events while the policy writes, refusals before them, errors behind them. No models."""

from __future__ import annotations

import asyncio
import base64
import json
from itertools import pairwise
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from serve_fakes import TRACE, Policy, encoded, slope

from sif_ray.config import ServeConfig
from sif_ray.serve.access import Keys
from sif_ray.serve.api import build_api
from sif_ray.serve.backends import Ask, Generation
from sif_ray.serve.protocol import DepthEvent, SifRequest, StepEvent
from sif_ray.serve.refusal import RequestRefused
from sif_ray.serve.service import SifService

CONFIG = ServeConfig(max_image_bytes=100_000, max_question_chars=100, timeout_s=0.5)


def ask(policy: Policy, question: str = "What is red?", path: str = "/v1/sif?stream=1") -> httpx.Response:
    client = TestClient(build_api(SifService(CONFIG, slope, policy), Keys({})))
    return client.post(path, json=SifRequest.of(encoded(), question).model_dump())


def events(reply: httpx.Response) -> list[tuple[str, Any]]:
    assert (reply.status_code, reply.headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
    blocks = [dict(line.split(": ", 1) for line in block.split("\n")) for block in reply.text.strip().split("\n\n")]
    return [(block["event"], json.loads(block["data"])) for block in blocks]


def without_times(reply: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in reply.items() if name != "seconds"}


@pytest.mark.parametrize("text", [TRACE, "<think>no end", "", '<think><area>[]</area><text>a</text><area>[{"bbox_2d"'])
def test_a_stream_shows_what_there_is_and_ends_with_the_whole_reply(text):
    policy = Policy()
    policy.text = text
    whole = ask(policy, path="/v1/sif").json()
    streamed = events(ask(policy))
    assert streamed[0] == ("depth", {"depth_image": whole["depth_image"]})
    name, reply = streamed[-1]
    assert (name, without_times(reply)) == ("reply", without_times(whole))
    assert {name for name, _ in streamed[1:-1]} <= {"step", "answer"}
    assert all(first != second for first, second in pairwise(streamed))
    assert policy.closed == 1

    steps: dict[int, Any] = {}
    for name, event in streamed:
        if name == "step":
            steps[event["index"]] = {"boxes": event["boxes"], "text": event["text"]}
    if whole["valid"]:
        assert [steps[index] for index in range(len(steps))] == whole["steps"]
        assert [event["text"] for name, event in streamed if name == "answer"][-1] == whole["answer"]
        assert sum(name == "step" for name, _ in streamed) > 2 * len(steps)  # they grow


def test_what_is_wrong_before_the_first_event_is_a_plain_refusal():
    for question, status, word in ((" ", 422, "blank"), ("x" * 101, 413, "101 characters")):
        reply = ask(Policy(), question)
        assert (reply.status_code, word in reply.json()["error"]["message"]) == (status, True)
    reply = ask(Policy(), path="/v1/sif?stream=perhaps")
    assert (reply.status_code, "query.stream" in reply.json()["error"]["message"]) == (422, True)


class Lost(Policy):
    """Its engine dies behind the first words."""

    async def stream(self, ask: Ask):
        async for part in super().stream(ask):
            yield part
            raise RequestRefused(503, "the policy that worked on this was lost; ask again")


class Late(Policy):
    async def stream(self, ask: Ask):
        self.seen.append(ask)
        try:
            yield Generation(TRACE[:100], 7, finish_reason=None)
            await asyncio.sleep(60)
        finally:
            self.closed += 1


@pytest.mark.parametrize(
    ("policy", "question", "word", "kind"),
    [
        (Policy(), "too long", "leaves no room", "invalid_request_error"),
        (Lost(), "?", "was lost; ask again", "server_error"),
        (Late(), "?", "0.5 s (timeout_s)", "server_error"),
    ],
)
def test_what_goes_wrong_on_the_way_is_the_last_event(policy, question, word, kind):
    streamed = events(ask(policy, question))
    assert streamed[0][0] == "depth"
    name, refusal = streamed[-1]
    assert (name, refusal["error"]["type"]) == ("error", kind)
    assert word in refusal["error"]["message"]


@pytest.mark.parametrize("waiting", [False, True], ids=["between events", "waiting for one"])
def test_who_hangs_up_ends_the_stream_of_the_policy(waiting):
    async def run():
        policy = Late()
        stream = await SifService(CONFIG, slope, policy).stream(encoded(), "?")
        assert [type(await anext(stream)) for _ in range(2)] == [DepthEvent, StepEvent]
        assert policy.closed == 0
        if waiting:
            asking = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.01)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
        else:
            await stream.aclose()
        assert policy.closed == 1

    asyncio.run(run())


def test_the_description_names_the_events():
    described = TestClient(build_api(SifService(CONFIG, slope, Policy()), Keys({}))).get("/openapi.json").json()
    operation = described["paths"]["/v1/sif"]["post"]
    assert [(parameter["name"], parameter["schema"]["type"]) for parameter in operation["parameters"]] == [
        ("stream", "boolean"),
        ("overlay", "boolean"),
    ]
    content = operation["responses"]["200"]["content"]
    assert content["application/json"]["schema"]["$ref"].endswith("SifResponse")
    kinds = [event["properties"] for event in content["text/event-stream"]["schema"]["anyOf"]]
    refs = {kind["event"]["const"]: kind["data"]["contentSchema"]["$ref"].rpartition("/")[2] for kind in kinds}
    assert refs == {
        "depth": "DepthEvent",
        "step": "StepEvent",
        "answer": "AnswerEvent",
        "reply": "SifResponse",
        "error": "Refusal",
    }
    assert set(refs.values()) <= set(described["components"]["schemas"])


def test_the_depth_image_of_a_stream_is_what_the_policy_is_shown():
    policy = Policy()
    [(_, depth), *_] = events(ask(policy))
    assert policy.seen[0].images[1] == base64.b64decode(depth["depth_image"])
