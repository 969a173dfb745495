"""The chat API, spoken by the official client: no Ray, no models."""

from __future__ import annotations

import base64
import json

import openai
import pytest
from fastapi.testclient import TestClient
from serve_fakes import TRACE, Policy, encoded, slope

from sif_ray.config import ServeConfig
from sif_ray.serve.access import Keys
from sif_ray.serve.api import build_api
from sif_ray.serve.service import SifService

CONFIG = ServeConfig(
    max_image_bytes=100_000, max_image_pixels=64 * 64, max_question_chars=100, temperature=0.25, max_tokens=50
)


@pytest.fixture
def policy() -> Policy:
    return Policy()


@pytest.fixture
def http(policy: Policy) -> TestClient:
    return TestClient(build_api(SifService(CONFIG, slope, policy), Keys({})))


@pytest.fixture
def client(http: TestClient) -> openai.OpenAI:
    return openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http, max_retries=0)


def data_url(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def user(*parts: str | bytes) -> dict:
    """A user message of texts and images."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(part)}}
        for part in parts
    ]
    return {"role": "user", "content": content}


def test_sif_answers_one_question_about_one_image_as_the_policy_was_trained(client, policy):
    image = encoded()
    reply = client.chat.completions.create(model="sif", messages=[user(image, "What is red?")])
    [choice] = reply.choices
    assert (choice.message.content, choice.finish_reason) == ("red ball", "stop")
    assert choice.message.reasoning_content == TRACE.partition("<answer>")[0]
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (30, len(TRACE))
    assert reply.policy_version == 7
    [asked] = policy.seen
    assert (asked.question, asked.messages, asked.seed) == ("What is red?", (), None)
    assert asked.images[0] == image and len(asked.images) == 2  # the depth image is the server's
    assert (asked.sampling.temperature, asked.sampling.max_tokens) == (0.25, 50)


def test_plain_hands_on_the_messages_and_gives_back_all_that_was_written(client, policy):
    photo, depth = encoded(), encoded((20, 20))
    messages = [
        {"role": "system", "content": "Be brief."},
        user("Original image: ", photo, "Depth image: ", depth, "What is red?"),
        {"role": "assistant", "content": "A ball."},
        user("Sure?"),
    ]
    reply = client.chat.completions.create(
        model="sif-plain", messages=messages, temperature=1, top_p=0.5, max_tokens=20, seed=3
    )
    assert reply.choices[0].message.content == TRACE
    assert not hasattr(reply.choices[0].message, "reasoning_content")
    [asked] = policy.seen
    assert asked.images == (photo, depth)
    assert asked.messages == (
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Original image: "},
                {"type": "image"},
                {"type": "text", "text": "Depth image: "},
                {"type": "image"},
                {"type": "text", "text": "What is red?"},
            ],
        },
        {"role": "assistant", "content": "A ball."},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    )
    sampling = asked.sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens, asked.seed) == (1, 0.5, 20, 3)


@pytest.mark.parametrize("model", ["sif", "sif-plain"])
@pytest.mark.parametrize("text", [TRACE, "<think>no end", "", "x <answer> red", "<answer>a</answer> b"])
def test_what_is_streamed_adds_up_to_what_is_sent_whole(client, policy, model, text):
    policy.text = text
    asked = {"model": model, "messages": [user(encoded(), "What is red?")]}
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    message = whole.choices[0].message
    assert "".join(delta.content or "" for delta in deltas) == message.content
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == getattr(
        message, "reasoning_content", ""
    )
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == ["stop"]
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    assert policy.closed == 1


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["sif", "sif-plain"]


@pytest.mark.parametrize(
    ("status", "word", "changes"),
    [
        (404, "there are sif, sif-plain", {"model": "gpt"}),
        (422, "one user message with one image", {"messages": [user("no image")]}),
        (422, "one user message with one image", {"messages": [user(encoded(), encoded(), "two")]}),
        (422, "one user message", {"messages": [{"role": "system", "content": "x"}, user(encoded(), "?")]}),
        (422, "0 images", {"messages": [user("no image")], "model": "sif-plain"}),
        (422, "3 images", {"messages": [user(encoded(), encoded(), encoded())], "model": "sif-plain"}),
        (422, "blank", {"messages": [user(encoded(), " ")]}),
        (413, "101 characters", {"messages": [user(encoded(), "x" * 101)]}),
        (413, "101 characters", {"messages": [user(encoded(), "x" * 50), user("x" * 51)], "model": "sif-plain"}),
        (400, "PNG", {"messages": [user(b"no image at all", "?")]}),
        (422, "leaves no room", {"messages": [user(encoded(), "too long")]}),
        (422, "temperature", {"temperature": 3}),
        (422, "max_tokens", {"max_tokens": 0}),
        (422, "n: ", {"n": 2}),
        (422, "stop", {"stop": ["x"]}),
        (422, "tools", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        (422, "messages", {"messages": []}),
        (422, "role", {"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_served_is_refused_by_name(client, status, word, changes, stream):
    asked = {"model": "sif", "messages": [user(encoded(), "?")], "stream": stream} | changes
    with pytest.raises(openai.APIStatusError, match=word) as refused:
        client.chat.completions.create(**asked)
    assert refused.value.status_code == status


@pytest.mark.parametrize("url", ["http://127.0.0.1/x.png", "file:///etc/passwd", "data:image/png,raw", "abc$"])
def test_addresses_and_broken_data_are_refused(client, url):
    part = {"type": "image_url", "image_url": {"url": url}}
    with pytest.raises(openai.BadRequestError, match="image"):
        client.chat.completions.create(model="sif", messages=[{"role": "user", "content": [part]}])


def test_fields_that_change_nothing_are_accepted(client):
    client.chat.completions.create(
        model="sif",
        messages=[user(encoded(), "?")],
        user="me",
        n=1,
        frequency_penalty=0,
        logprobs=False,
        response_format={"type": "text"},
        store=False,
    )


def test_other_errors_have_the_same_form_and_the_description_is_whole(http):
    for reply in (http.get("/nothing"), http.get("/v1/sif"), http.post("/v1/chat/completions", content=b"{")):
        assert 400 <= reply.status_code < 500
        assert reply.json()["error"]["message"]
    described = http.get("/openapi.json").json()

    def refs(node):
        if isinstance(node, dict):
            yield from ([node["$ref"]] if "$ref" in node else [])
            node = list(node.values())
        if isinstance(node, list):
            for item in node:
                yield from refs(item)

    missing = [ref for ref in refs(described) if ref.rpartition("/")[2] not in described["components"]["schemas"]]
    assert not missing
    assert "ChatMessage" in json.dumps(described)
