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

from sif_ray.config import ServeConfig

ROOT = Path(__file__).parents[2]
KEY = "sk-Of-Alice-5e1f"
SERVED_AT = "http://127.0.0.1:8000"


@pytest.fixture(scope="module", params=[{}, {"alice": KEY}], ids=["open", "keys"])
def server(request):
    with http_server(ServeConfig(), request.param) as (base_url, _):
        yield base_url, bool(request.param)


def blocks(page: str, word: str) -> list[str]:
    """The code of a page that has a word in it."""
    found = re.findall(r"^```\w*\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return [block for block in found if word in block]


def run(command: list[str], folder: Path) -> str:
    (folder / "photo.png").write_bytes(encoded())
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
