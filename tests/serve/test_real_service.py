"""One real application, from HTTP through Ray Serve, Depth Anything and vLLM, and what is left of it afterwards."""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.error
import urllib.request

import numpy as np
import openai
import psutil
import pytest
from openai.types.chat import ChatCompletionChunk
from PIL import Image
from processes import engine_processes
from ray_metrics import scrape

from sif_ray.config import EngineConfig, ServeConfig
from sif_ray.depth.estimator import DepthEstimator
from sif_ray.method import depth_code
from sif_ray.serve.answer_split import Part, split_answer
from sif_ray.serve.client import ask
from sif_ray.serve.stage import serving
from sif_ray.toyworld.questions import draw_questions
from sif_ray.toyworld.render import png, render
from sif_ray.toyworld.scenes import make_scene

EXPORTED_WITHIN_S = 60.0

CONFIG = ServeConfig(
    policy="toy",
    depth_model="toy",
    port=0,
    max_tokens=24,
    max_question_chars=5000,
    engine=EngineConfig(max_model_len=512, max_num_seqs=8, kv_cache_gib=0.25),
)


@pytest.mark.timeout(900)  # a busy machine may be slow, not wrong
def test_a_request_is_answered_over_http_and_nothing_is_left_running(ray_local: None) -> None:
    scene = make_scene(987_654)
    rendering = render(scene)
    photo, question = png(rendering.rgb), draw_questions(scene, 1)[0].text
    with serving(CONFIG) as base_url:
        assert base_url.startswith("http://127.0.0.1:")
        reply = ask(base_url, photo, question)
        with pytest.raises(urllib.error.HTTPError) as broken:
            ask(base_url, b"no image", question)
        with pytest.raises(urllib.error.HTTPError) as long:
            ask(base_url, photo, "ball " * 900)
        client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0)
        url = "data:image/png;base64," + base64.b64encode(photo).decode()
        image = {"type": "image_url", "image_url": {"url": url}}
        asked = {"messages": [{"role": "user", "content": [image, {"type": "text", "text": question}]}]}
        whole = client.chat.completions.create(model="sif", **asked)
        streamed = list(client.chat.completions.create(model="sif", stream=True, **asked))
        sampled = asked | {"model": "sif-plain", "temperature": 2.0, "seed": 3}
        plain = client.chat.completions.create(**sampled)
        plain_streamed = list(client.chat.completions.create(**sampled, stream=True))
        short = client.chat.completions.create(**sampled, max_tokens=1)
        engine = engine_processes()
        counted = _counted("ray_sif_ray_requests_total", {"route": "/v1/chat/completions", "status": "200"}, at_least=5)
        refused = _counted("ray_sif_ray_requests_total", {"route": "/v1/sif", "status": "400"}, at_least=1)
        traces = _counted("ray_sif_ray_traces_total", {"valid": str(reply.valid).lower()}, at_least=1)
        assert urllib.request.urlopen(f"{base_url}/readyz", timeout=30).status == 200
        assert engine, f"no engine among {psutil.Process().children(recursive=True)}"

    assert reply.text
    assert reply.valid == (not reply.reasons)
    assert reply.policy_version == 0
    assert reply.seconds.generate > 0
    with Image.open(io.BytesIO(base64.b64decode(reply.depth_image))) as shown:
        depth_rel = depth_code.decode(np.asarray(shown.convert("RGB")))
    [expected] = DepthEstimator("toy").estimate([Image.fromarray(rendering.rgb)])
    assert np.abs(depth_rel - expected).max() <= 0.51 / 255

    message = whole.choices[0].message
    assert split_answer(reply.text) == Part(getattr(message, "reasoning_content", ""), message.content)
    assert _joined(streamed, "content") == message.content
    assert _joined(streamed, "reasoning_content") == getattr(message, "reasoning_content", "")
    assert _joined(plain_streamed, "content") == plain.choices[0].message.content
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 1)

    assert (counted, refused, traces) == (5, 1, 1)
    assert broken.value.code == 400
    assert long.value.code == 422
    assert "max_model_len = 512" in json.loads(long.value.read())["error"]["message"]

    _, alive = psutil.wait_procs(engine, timeout=20)
    assert not alive


def _joined(chunks: list[ChatCompletionChunk], name: str) -> str:
    return "".join(getattr(choice.delta, name, None) or "" for chunk in chunks for choice in chunk.choices)


def _counted(name: str, labels: dict[str, str], at_least: float) -> float:
    """A counter at Ray's metrics endpoint, which is some seconds late."""
    ends_s = time.monotonic() + EXPORTED_WITHIN_S
    while True:
        found = sum(value for series, had, value in scrape() if series == name and labels.items() <= had.items())
        if found >= at_least or time.monotonic() > ends_s:
            return found
        time.sleep(1)
