"""The commands of the documentation, as they are written there, against a server on loopback."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from serve_fakes import TRACE, encoded, http_server

from sif_ray.config import EngineConfig, ServeConfig
from sif_ray.serve.stage import serving
from sif_ray.toyworld.render import png, render
from sif_ray.toyworld.scenes import make_scene

ROOT = Path(__file__).parents[2]
KEY = "sk-Of-Alice-5e1f"
SERVED_AT = "http://127.0.0.1:8000"
IN_THE_DOCS, ABOUT_THE_SCENE = (
    "Which is closer, the red ball or the green cube?",
    "What colour is the object left of the orange cone?",
)
WHOLE = """
reply = client.chat.completions.create(model="sif", messages=[{"role": "user", "content": content}])
print(reply.choices[0].message.content)
"""


@pytest.fixture(scope="module", params=[{}, {"alice": KEY}], ids=["open", "keys"])
def server(request):
    with http_server(ServeConfig(), request.param) as (base_url, _):
        yield base_url, bool(request.param)


def blocks(page: str, word: str) -> list[str]:
    """The code of a page that has a word in it."""
    found = re.findall(r"^```\w*\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return [block for block in found if word in block]


def run(command: list[str], folder: Path, photo: bytes = encoded()) -> str:
    (folder / "photo.png").write_bytes(photo)
    environment = os.environ | {"SIF_KEY": KEY}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("bash")), reason="needs curl and bash")
@pytest.mark.parametrize(
    ("page", "path", "with_key"),
    [
        ("README.md", "/v1/sif -F", False),
        ("docs/serving.md", "/v1/sif -F", False),
        ("docs/serving.md", "/v1/chat", True),
    ],
)
def test_curl(server, tmp_path, page, path, with_key):
    base_url, keys = server
    [block] = blocks(page, f"{SERVED_AT}{path}")
    command = "\n".join(line for line in block.splitlines() if not line.startswith("sif-ray"))
    reply = json.loads(run(["bash", "-c", command.replace(SERVED_AT, base_url)], tmp_path))
    if keys and not with_key:
        assert reply["error"]["type"] == "authentication_error"
    else:
        answer = reply["answer"] if "/v1/sif" in path else reply["choices"][0]["message"]["content"]
        assert answer == "red ball"


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("bash")), reason="needs curl and bash")
@pytest.mark.parametrize("server", [{}], indirect=True, ids=["open"])
def test_curl_draws_and_streams(server, tmp_path):
    base_url, _ = server
    [draw] = blocks("docs/serving.md", "/v1/sif?overlay=1")
    run(["bash", "-c", draw.replace(SERVED_AT, base_url)], tmp_path)
    with Image.open(tmp_path / "looked.jpg") as picture:
        assert (picture.format, picture.width) == ("JPEG", 774)
    [stream] = blocks("docs/serving.md", "/v1/sif?stream=1")
    events = re.findall(
        r"^event: (\w+)$", run(["bash", "-c", stream.replace(SERVED_AT, base_url)], tmp_path), re.MULTILINE
    )
    assert (events[0], events[-1]) == ("depth", "reply")


def test_openai(server, tmp_path):
    base_url, keys = server
    [block] = blocks("docs/serving.md", "import base64, pathlib, openai")
    program = block.replace(SERVED_AT, base_url)
    if keys:
        program = program.replace('api_key="none"', f'api_key="{KEY}"')
    written = run([sys.executable, "-c", program], tmp_path)
    assert written == TRACE.partition("<answer>")[0] + "red ball"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif("SIF_RAY_POLICY" not in os.environ, reason="SIF_RAY_POLICY names no checkpoint")
def test_a_trained_policy_answers_every_client(ray_local, tmp_path):
    config = ServeConfig(
        policy=os.environ["SIF_RAY_POLICY"],
        port=0,
        max_tokens=200,
        engine=EngineConfig(max_model_len=512, max_num_seqs=8, kv_cache_gib=0.25),
    )
    photo = png(render(make_scene(2_000_010)).rgb)
    [curl] = blocks("docs/serving.md", f"{SERVED_AT}/v1/sif -F")
    [stream] = blocks("docs/serving.md", "/v1/sif?stream=1")
    [client] = blocks("docs/serving.md", "import base64, pathlib, openai")
    with serving(config) as base_url:

        def written(*command: str) -> str:
            changed = [part.replace(SERVED_AT, base_url).replace(IN_THE_DOCS, ABOUT_THE_SCENE) for part in command]
            return run(changed, tmp_path, photo)

        reply = json.loads(written("bash", "-c", curl))
        events = written("bash", "-c", stream)
        streamed = written(sys.executable, "-c", client)
        whole = written(sys.executable, "-c", client.partition("for chunk")[0] + WHOLE)
    assert reply["valid"], reply["reasons"]
    assert json.loads(events.rpartition("data: ")[2])["text"] == reply["text"]
    assert streamed.endswith(reply["answer"])
    assert whole.strip() == reply["answer"]
