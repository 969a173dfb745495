"""The page at `/` in a real browser: a picture, a question, and what is looked at while it is written.

Screenshots are kept in artefacts/. The slow test asks a real policy: SIF_RAY_POLICY names its checkpoint, for example
that of the quickstart.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import math
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn
from browser import Window, needs_chromium, num_saturated_colours, opened
from fastapi.testclient import TestClient
from PIL import Image
from serve_fakes import Policy, encoded, slope

from sif_ray.config import EngineConfig, ServeConfig
from sif_ray.depth.encoding import depth_png
from sif_ray.method.boxes import FULL_IMAGE, Box
from sif_ray.method.depth_code import box_mean, from_disparity
from sif_ray.method.trace import EXPLANATIONS, AreaBox, Step, Trace
from sif_ray.serve.access import Keys
from sif_ray.serve.api import build_api
from sif_ray.serve.backends import Ask, Refused
from sif_ray.serve.service import SifService
from sif_ray.serve.stage import serving
from sif_ray.toyworld.questions import all_questions
from sif_ray.toyworld.render import png, render
from sif_ray.toyworld.scenes import make_scene

EXAMPLES = {"example-1.png": 2_000_016, "example-2.png": 2_000_010, "example-3.png": 2_000_011}  # seeds of their scenes
SCENE = make_scene(EXAMPLES["example-1.png"])
PHOTO = render(SCENE)
DEPTH_REL = from_disparity(PHOTO.disparity)
QUESTION = "Which is closer, the red ball or the yellow ball?"


def looked(*boxes: Box) -> tuple[AreaBox, ...]:
    rounded = (tuple(round(number, 3) for number in box) for box in boxes)
    return tuple(AreaBox(box, round(box_mean(DEPTH_REL, box), 3)) for box in rounded)  # type: ignore[arg-type]


TRACE = Trace(
    (
        Step(looked(FULL_IMAGE), "There is a red ball on the left, a purple cone and a yellow ball."),
        Step(looked(PHOTO.box(0), PHOTO.box(2)), "The red ball is far away. The yellow ball has the smaller depth."),
        Step(looked(PHOTO.box(2)), "The yellow ball is closer."),
    ),
    "yellow ball",
)


class Held(Policy):
    """Writes as far as it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.text = TRACE.render()
        self.num_chars = len(self.text)

    def let_write(self, until: str) -> None:
        self.num_chars = self.text.index(until) + len(until)

    async def stream(self, ask: Ask):
        sent = 0
        async with contextlib.aclosing(super().stream(ask)) as parts:
            async for part in parts:
                if isinstance(part, Refused):
                    yield part
                    return
                for character in part.text:
                    while sent >= self.num_chars:
                        await asyncio.sleep(0.01)
                    sent += 1
                    yield replace(part, text=character)


async def true_depth(photo: bytes) -> bytes:
    return depth_png(DEPTH_REL)


@contextlib.contextmanager
def served(policy: Policy, keys: Keys | None = None, **settings) -> Iterator[str]:
    """The API over HTTP around a stand-in, as its base URL."""
    api = build_api(SifService(ServeConfig(**settings), true_depth, policy), keys or Keys({}))
    server = uvicorn.Server(uvicorn.Config(api, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def visited(policy: Policy, keys: Keys | None = None, **settings) -> Iterator[Window]:
    """Its page, in a window in which nothing moves by itself."""
    with served(policy, keys, **settings) as base_url, opened(base_url) as window:
        window.resize(1280, 900, still=True)
        yield window


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(png(PHOTO.rgb))
    return path


def ask_by_keys(window: Window, photo: Path, question: str = QUESTION) -> None:
    window.choose_file("#file", photo)
    window.until("document.activeElement.id === 'question'")
    window.write(question)
    window.press("Enter")


def answered(window: Window, question: str = QUESTION) -> str:
    """The answer, when the whole reply is there."""
    window.until(f"document.querySelector('#asked').textContent === {json.dumps(question)}")
    window.until("document.querySelector('#state').textContent.includes('well-formed')")
    return window.text("#answer")


def assert_frames(window: Window, boxes: tuple[AreaBox, ...]) -> None:
    """The frames over both pictures are where the boxes are, to a pixel."""
    for picture in ("#photo", "#depth"):
        assert window.ask(f"document.querySelectorAll('{picture} .box').length") == len(boxes)
        left, top, right, bottom = window.box(f"{picture} .frame")
        for number, box in enumerate(boxes, 1):
            x1, y1, x2, y2 = box.bbox_2d
            width, height = right - left, bottom - top
            expected = (left + x1 * width, top + y1 * height, left + x2 * width, top + y2 * height)
            assert window.box(f"{picture} .box:nth-child({number})") == pytest.approx(expected, abs=1)


def assert_clean(window: Window, *expected: str) -> None:
    """Nothing was asked of other hosts, and the console holds no errors but the expected ones."""
    addresses = [address for address in window.requests if not address.startswith(("blob:", "data:"))]
    assert addresses
    assert all(address.startswith(window.url) for address in addresses), addresses
    assert not [complaint for complaint in window.complaints if not any(word in complaint for word in expected)]


def test_the_page_and_its_files_are_kept_to_themselves():
    config = ServeConfig(max_image_bytes=1234)
    client = TestClient(build_api(SifService(config, slope, Policy()), Keys({"alice": "a-key"})))
    page = client.get("/")
    assert "1234" in page.text
    names = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
    assert {"page/page.css", "page/page.js", "docs"} < set(names)
    for name in ("", *names):
        reply = client.get(f"/{name}")
        assert reply.status_code == 200, name
        if name != "docs":  # FastAPI's own
            assert reply.headers["x-content-type-options"] == "nosniff"
            assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert client.get("/page/../../api.py").status_code == 404
    assert client.get("/page/nothing").json()["error"]["message"]


def test_the_examples_are_scenes_of_the_toy_world_with_questions_about_them():
    folder = resources.files("sif_ray.serve") / "page"
    html = (folder / "index.html").read_text()
    for (name, seed), question in zip(EXAMPLES.items(), re.findall(r"<span>([^<]+\?)</span>", html), strict=True):
        scene = make_scene(seed)
        with Image.open(io.BytesIO((folder / name).read_bytes())) as picture:
            assert np.array_equal(np.asarray(picture), render(scene).rgb)
        assert question in [asked.text for questions in all_questions(scene).values() for asked in questions]


@needs_chromium
def test_looks_appear_one_after_another_where_they_are(photo):
    policy = Held()
    policy.let_write("<think>")
    with visited(policy) as window:
        ask_by_keys(window, photo)
        window.until("!document.querySelector('#depth img').hidden")
        assert window.text("#steps") == ""
        assert_frames(window, ())

        policy.let_write("</area>")
        window.until("document.querySelectorAll('#steps li').length === 1")
        assert_frames(window, TRACE.steps[0].boxes)
        policy.let_write("There is a red")
        window.until("document.querySelector('.said').textContent.startsWith('There is a red')")
        assert window.ask("document.querySelector('.said').textContent.length") < 20
        policy.let_write("red ball is far away.")
        window.until("document.querySelectorAll('#steps li').length === 2")
        assert_frames(window, TRACE.steps[1].boxes)
        assert window.text("#news").startswith("Look 1: the whole picture (depth 0.")
        assert window.text("#answer") == "…"
        policy.let_write("<answer>yellow")
        window.until("document.querySelector('#answer').textContent === 'yellow'")
        policy.let_write("</answer>")

        assert answered(window) == "yellow ball"
        assert window.text("#state") == "✓ well-formed trace"
        news = window.ask("[...document.querySelectorAll('#news p')].map((line) => line.textContent)")
        assert [line.partition(":")[0] for line in news] == ["Look 1", "Look 2", "Look 3", "Answer"]
        assert news[-1] == "Answer: yellow ball"
        assert "policy version 7" in window.text("#print")
        assert window.ask("document.querySelector('#raw').textContent") == TRACE.render()
        assert window.ask("document.querySelector('#stop').hidden")
        assert_frames(window, TRACE.steps[2].boxes)
        x1, y1, x2, y2 = (math.floor(100 * number + 0.5) for number in TRACE.steps[2].boxes[0].bbox_2d)
        depth = f"depth {TRACE.steps[2].boxes[0].depth:.2f}, near"
        place = f"from {x1} to {x2} % across and {y1} to {y2} % down ({depth})"
        assert place in window.ask("document.querySelector('#photo img').alt")
        assert place in window.ask("document.querySelector('#depth img').alt")
        assert depth in window.text("#steps li:last-child")

        while not window.ask("document.activeElement.matches('#steps button')"):
            window.press("Tab")
            assert window.ask("document.activeElement !== document.body")
        assert_frames(window, TRACE.steps[0].boxes)
        window.press("ArrowDown")
        assert_frames(window, TRACE.steps[1].boxes)
        window.press("Tab")
        assert_frames(window, TRACE.steps[2].boxes)
        window.press("Home")
        assert_frames(window, TRACE.steps[0].boxes)
        window.click("#steps li:nth-child(2) button")
        assert_frames(window, TRACE.steps[1].boxes)

        left, _, right, bottom = window.box("#depth .frame")
        window.point((left + right) / 2, bottom - 1)
        shown = window.until("document.querySelector('#pointed').textContent")
        assert f"depth {DEPTH_REL[-1, 56]:.2f}, near" in shown
        assert_clean(window)


@needs_chromium
def test_an_example_is_one_press_and_frames_glide_where_motion_is_welcome():
    policy = Held()
    with visited(policy) as window:
        for still in (False, True):
            window.open(window.url)
            window.resize(1280, 900, still=still)
            window.click(".examples button")
            assert answered(window) == "yellow ball"
            window.click("#steps li:first-child button")
            window.click("#steps li:last-child button")
            moving = "document.querySelector('#photo .box').getAnimations().length"
            assert bool(window.ask(moving)) is not still
        assert policy.seen[0].question == window.text(".examples li:first-child") == QUESTION
        with Image.open(io.BytesIO(policy.seen[0].images[0])) as sent:
            assert np.array_equal(np.asarray(sent), PHOTO.rgb)

        window.click("#replay")
        window.until("document.querySelector('#steps button').ariaCurrent === 'step'")
        window.until("document.querySelector('#steps li:nth-child(2) button').ariaCurrent === 'step'")
        window.click("#replay")
        assert window.ask("document.querySelector('#replay').ariaPressed") == "false"
        assert_clean(window)


@needs_chromium
@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_a_picture_can_be_dropped_or_pasted(kind):
    policy = Held()
    image = encoded()
    events = {
        "drop": "new DragEvent('drop', {dataTransfer: data})",
        "paste": "new ClipboardEvent('paste', {clipboardData: data})",
    }
    with visited(policy) as window:
        window.ask(
            f"""(() => {{
                const data = new DataTransfer();
                data.items.add(new File([new Uint8Array({list(image)})], "here.png", {{type: "image/png"}}));
                document.dispatchEvent({events[kind]});
            }})()"""
        )
        window.until("document.querySelector('#drop').innerText.includes('here.png')")
        window.ask("document.querySelector('#question').focus()")
        window.write(QUESTION)
        window.press("Enter")
        assert answered(window) == "yellow ball"
        assert policy.seen[0].images[0] == image
        assert_clean(window)


@needs_chromium
def test_stop_ends_the_stream_of_the_policy_and_another_question_can_be_asked(photo):
    policy = Held()
    policy.let_write("There is")
    with visited(policy) as window:
        ask_by_keys(window, photo)
        window.until("document.querySelectorAll('#steps li').length === 1")
        assert policy.closed == 0
        window.click("#stop")
        window.until("document.querySelector('#state').textContent === 'stopped'")
        ends_s = time.monotonic() + 10
        while policy.closed == 0 and time.monotonic() < ends_s:
            time.sleep(0.01)
        assert policy.closed == 1
        assert window.ask("document.querySelector('#problem').hidden")
        policy.let_write("</answer>")
        window.click("#ask")
        assert answered(window) == "yellow ball"
        assert_clean(window)


@needs_chromium
def test_a_key_is_asked_for_where_one_is_needed_and_stays_in_the_tab(photo):
    policy = Held()
    with visited(policy, Keys({"alice": "a-key"})) as window:
        assert not window.ask("document.querySelector('#key-part').open")
        ask_by_keys(window, photo)
        window.until("document.activeElement.id === 'key'")
        assert window.text("[role=alert]") == "This server answers only with an API key."
        window.write("a-key")
        window.press("Enter")
        assert answered(window) == "yellow ball"
        assert window.ask("document.querySelector('#problem').hidden")
        assert window.ask("[sessionStorage.getItem('key'), localStorage.length]") == ["a-key", 0]
        assert not [address for address in window.requests if "a-key" in address]
        assert_clean(window, "401")


@needs_chromium
def test_what_the_server_refuses_is_told_with_the_time_to_wait(photo):
    policy = Held()
    policy.let_write("<think>")
    with visited(policy, max_requests=1, max_question_chars=60) as window:
        asked = {"files": {"image": encoded()}, "data": {"question": "?"}}
        with httpx.stream("POST", f"{window.url}/v1/sif?stream=1", **asked) as stream:
            lines = stream.iter_lines()  # closed with the request when nobody holds it
            next(lines)
            ask_by_keys(window, photo)
            window.until("!document.querySelector('#problem').hidden")
            assert window.text("[role=alert]") == "1 requests are under way; ask again. The server asks to wait 1 s."
        policy.let_write("</answer>")
        window.until("!document.querySelector('#again').disabled")
        window.click("#again")
        assert answered(window) == "yellow ball"
        assert_clean(window, "503")

        policy.text = "<think>nothing"
        window.click("#ask")
        assert answered(window) == "No answer was written"
        assert EXPLANATIONS["no_answer"] in window.text("#reasons")
        assert window.text("#empty") == "The model looked nowhere."
        window.ask("document.querySelector('#question').value = 'too long'")
        window.click("#ask")
        window.until("!document.querySelector('#problem').hidden")
        assert "leaves no room" in window.text("[role=alert]")
        assert window.ask("document.querySelector('#again').hidden")


@needs_chromium
@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("notes.txt", b"no picture", "no PNG, JPEG or WebP"),
        ("broken.png", b"no picture", "damaged"),
        ("big.png", b"x" * 2000, "up to"),
    ],
)
def test_pictures_are_checked_before_they_are_sent(tmp_path, name, content, word):
    (tmp_path / name).write_bytes(content)
    policy = Held()
    with visited(policy, max_image_bytes=1000) as window:
        window.choose_file("#file", tmp_path / name)
        window.until("!document.querySelector('#problem').hidden")
        assert word in window.text("[role=alert]")
        window.click("#ask")
        assert "Choose a picture" in window.text("[role=alert]")
        assert not policy.seen
        assert_clean(window)


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_looks_right_on_a_desk_and_on_a_phone(photo, dark):
    policy = Held()
    tone = "-dark" if dark else ""
    with visited(policy) as window:
        window.resize(1280, 900, dark, still=True)
        window.screenshot(f"page-start{tone}")
        window.resize(390, 844, dark, still=True)
        window.screenshot(f"page-phone-start{tone}", whole=True)
        window.resize(1280, 900, dark, still=True)
        ask_by_keys(window, photo)
        answered(window)
        window.click("#steps li:nth-child(2) button")
        desk = window.screenshot("page-dark" if dark else "page-light", whole=True)
        window.resize(390, 844, dark, still=True)
        phone = window.screenshot(f"page-phone{tone}", whole=True)
        assert window.ask("document.documentElement.scrollWidth") <= 390
    for picture, width in ((desk, 1280), (phone, 390)):
        assert picture.width == width
        assert num_saturated_colours(picture) > 20


@needs_chromium
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif("SIF_RAY_POLICY" not in os.environ, reason="SIF_RAY_POLICY names no checkpoint")
def test_a_real_policy_is_watched(ray_local):
    config = ServeConfig(
        policy=os.environ["SIF_RAY_POLICY"],
        depth_model="toy",
        port=0,
        max_tokens=200,
        engine=EngineConfig(max_model_len=512, max_num_seqs=8, kv_cache_gib=0.25),
    )
    with serving(config) as base_url, opened(base_url) as window:
        window.resize(1280, 900, still=True)
        for number in range(1, 4):
            example = f".examples li:nth-child({number})"
            window.click(f"{example} button")
            answer = answered(window, window.text(example))
            print(window.text("#asked"), "->", answer, window.text("#state"), window.text("#print"))
            assert window.text("#state") == "✓ well-formed trace"
            assert window.ask("document.querySelectorAll('#steps li').length") >= 1
            window.screenshot(f"page-real-{number}", whole=True)
        assert_clean(window)
