"""An engine that dies under a request: a clean error for it, and another engine for the next."""

from __future__ import annotations

import base64
import shutil
import time
from dataclasses import replace
from pathlib import Path

import openai
import pytest
import torch
from processes import engine_processes
from safetensors.torch import load_file, save_file

from sif_ray.config import EngineConfig, ServeConfig
from sif_ray.policy.model import resolve_model
from sif_ray.serve.stage import serving
from sif_ray.toyworld.render import png, render
from sif_ray.toyworld.scenes import make_scene

CONFIG = ServeConfig(
    depth_model="toy",
    port=0,
    max_tokens=3000,
    engine=EngineConfig(max_model_len=4096, max_num_seqs=4, kv_cache_gib=0.5),
)


def babbling(folder: Path) -> str:
    """The toy policy with every token as likely as any other, so that it seldom finds an end."""
    shutil.copytree(resolve_model("toy"), folder)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"lm_head.weight": torch.zeros_like(weights["lm_head.weight"])}, folder / "model.safetensors")
    return str(folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lost_engine_is_told_and_replaced(ray_local, tmp_path):
    url = "data:image/png;base64," + base64.b64encode(png(render(make_scene(3)).rgb)).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "How many balls are there?"}]
    asked = {"model": "sif", "messages": [{"role": "user", "content": content}]}
    long = asked | {"temperature": 1.0, "seed": 1, "stream": True}
    with serving(replace(CONFIG, policy=babbling(tmp_path / "policy"))) as base_url:
        client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=300)
        client.chat.completions.create(**asked, max_tokens=4)
        before = engine_processes()
        with client.chat.completions.create(**long) as stream, pytest.raises(openai.APIError, match="was lost; ask"):
            for number, _ in enumerate(stream):
                if number == 3:
                    before[0].kill()

        refusals = []
        while True:
            try:
                client.chat.completions.create(**asked, max_tokens=4)
                break
            except openai.InternalServerError as error:
                assert error.status_code == 503, error
                assert int(error.response.headers["retry-after"]) > 0
                refusals.append(str(error))
                time.sleep(1)
        print(f"{len(refusals)} refusals until another engine was there")
        assert not [process for process in before if process.is_running()]
        assert engine_processes()
