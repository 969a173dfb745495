"""The HTTP interface against its own description: whatever a client makes of `/openapi.json`, the replies are those
that it names, and nothing is an error of the server."""

from __future__ import annotations

import pytest
import schemathesis
from fastapi import HTTPException
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS
from schemathesis.core.failures import FailureGroup
from serve_fakes import Policy, slope

from sif_ray.config import ServeConfig
from sif_ray.serve.access import Keys
from sif_ray.serve.api import build_api
from sif_ray.serve.protocol import ChatRequest, DepthEvent, SifRequest
from sif_ray.serve.service import SifService

CONFIG = ServeConfig(max_image_bytes=100_000, max_image_pixels=64 * 64, max_question_chars=100)
API = build_api(SifService(CONFIG, slope, Policy()), Keys({}))
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", API)
ANY_DATA = settings(deadline=None, suppress_health_check=list(HealthCheck))
# An image is any string to a schema, and most strings are none: what a schema allows may still be refused.
REFUSES_MORE = CHECKS.get_by_names(["positive_data_acceptance"])
# All values of a form are text, and what is no text to its schema arrives as one.
TEXT_ONLY = CHECKS.get_by_names(["negative_data_rejection"])


def validate(case: schemathesis.Case) -> None:
    excluded = REFUSES_MORE + (TEXT_ONLY if case.media_type == "multipart/form-data" else [])
    case.call_and_validate(excluded_checks=excluded)


@SCHEMA.parametrize()
@settings(ANY_DATA, max_examples=25)
def test_replies_are_those_that_are_described(case):
    validate(case)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@SCHEMA.parametrize()
@settings(ANY_DATA, max_examples=500)
def test_many_replies_are_those_that_are_described(case):
    validate(case)


def sif_example(stream: bool) -> schemathesis.Case:
    """The request that the description gives as an example."""
    [body] = SifRequest.model_json_schema()["examples"]
    return SCHEMA["/v1/sif"]["POST"].Case(body=body, query={"stream": stream}, media_type="application/json")


def chat_example(stream: bool) -> schemathesis.Case:
    [body] = ChatRequest.model_json_schema()["examples"]
    body = body | {"stream": stream}
    return SCHEMA["/v1/chat/completions"]["POST"].Case(body=body, media_type="application/json")


@pytest.mark.parametrize("example", [sif_example, chat_example])
@pytest.mark.parametrize("stream", [False, True])
def test_examples_are_answered_as_described(example, stream):
    reply = example(stream).call_and_validate()
    assert reply.status_code == 200
    assert reply.headers["content-type"][0].startswith("text/event-stream" if stream else "application/json")


def test_events_of_another_form_are_seen(monkeypatch):
    monkeypatch.setattr(DepthEvent, "model_dump_json", lambda self: '{"depth": 1}')
    with pytest.raises(FailureGroup, match="violates schema"):
        sif_example(stream=True).call_and_validate()


@pytest.mark.parametrize(("status", "check"), [(418, "Undocumented status code"), (500, "Server error")])
def test_the_checks_are_not_blind(status, check):
    api = build_api(SifService(CONFIG, slope, Policy()), Keys({}))

    @api.get("/strange")
    async def strange() -> None:
        raise HTTPException(status)

    case = schemathesis.openapi.from_asgi("/openapi.json", api)["/strange"]["GET"].Case()
    with pytest.raises(FailureGroup, match=check):
        validate(case)
