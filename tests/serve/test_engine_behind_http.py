"""What a client sees when an engine dies, and what an engine does when a client is gone."""

from __future__ import annotations

import base64
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from processes import engine_processes

from sif_ray.bench.serve import write_babbling_policy
from sif_ray.config import EngineConfig, ServeConfig
from sif_ray.serve.stage import serving
from sif_ray.toyworld.render import png, render
from sif_ray.toyworld.scenes import make_scene

CONFIG = ServeConfig(
    depth_model="toy",
    port=0,
    max_tokens=16_000,
    engine=EngineConfig(max_model_len=16_384, max_num_seqs=4, kv_cache_gib=0.5),
)


def asked(**others: Any) -> dict[str, Any]:
    url = "data:image/png;base64," + base64.b64encode(png(render(make_scene(3)).rgb)).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "How many balls are there?"}]
    return {"model": "sif", "messages": [{"role": "user", "content": content}], **others}


ENDLESS = asked(temperature=0)
"""Where all tokens are as likely, the first of the vocabulary wins every time: minutes of it."""


def endless_policy(folder: Path) -> str:
    """One that has room to write for minutes."""
    write_babbling_policy(folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = CONFIG.engine.max_model_len
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lost_engine_is_told_and_replaced(ray_local, tmp_path):
    with serving(replace(CONFIG, policy=endless_policy(tmp_path / "policy"))) as base_url:
        client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=300)
        client.chat.completions.create(**asked(max_tokens=4))
        before = engine_processes()
        with client.chat.completions.create(**ENDLESS, stream=True) as stream:
            next(stream)  # the engine is at work
            before[0].kill()
            with pytest.raises(openai.APIError, match="was lost; ask"):
                list(stream)

        refusals = 0
        while True:
            try:
                client.chat.completions.create(**asked(max_tokens=4))
                break
            except openai.InternalServerError as error:
                assert error.status_code == 503, error
                assert int(error.response.headers["retry-after"]) > 0
                refusals += 1
                time.sleep(1)
        print(f"{refusals} refusals until another engine was there")
        assert not [process for process in before if process.is_running()]
        assert engine_processes()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_engine_stops_writing_when_nobody_waits_any_more(ray_local, tmp_path):
    config = replace(CONFIG, policy=endless_policy(tmp_path / "policy"), timeout_s=8.0)
    with serving(config) as base_url:
        client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0)
        engine = engine_processes()
        client.chat.completions.create(**asked(max_tokens=4))
        assert rests(engine)

        with client.chat.completions.create(**ENDLESS, stream=True) as stream:
            next(stream)
            assert not rests(engine, patience_s=2)
        assert rests(engine), "the client of a stream hung up"

        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{base_url}/v1/chat/completions", json=ENDLESS, timeout=4)
        assert rests(engine), "the client of a whole reply hung up"

        with pytest.raises(openai.InternalServerError, match="8 s") as late:
            client.chat.completions.create(**ENDLESS)
        assert late.value.status_code == 504
        assert rests(engine), "the deadline had passed"
        with pytest.raises(openai.APIError, match="8 s"):
            list(client.chat.completions.create(**ENDLESS, stream=True))
        assert rests(engine), "the deadline of a stream had passed"


def rests(engine: list[psutil.Process], patience_s: float = 20) -> bool:
    """Whether a second comes in which the engine's processes do next to nothing."""

    def used_s() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in engine)

    ends_s = time.monotonic() + patience_s
    while time.monotonic() < ends_s:
        before_s = used_s()
        time.sleep(1)
        if used_s() - before_s < 0.2:
            return True
    return False
