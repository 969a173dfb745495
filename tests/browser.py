"""Pages as a real browser draws them."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from websockets.sync.client import ClientConnection, connect

ARTEFACTS = Path(__file__).resolve().parents[1] / "artefacts"  # screenshots for people; not in the repository
needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")

_OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
    "--disable-background-networking --disable-component-update --disable-sync"
)


WAIT_S = 20.0  # for anything that a page does; the machine may be busy
KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "ArrowDown": (40, ""), "ArrowUp": (38, ""), "Home": (36, "")}


def screenshot(page: Path, name: str, width: int, height: int, dark: bool = False) -> Image.Image:
    """The top `height` px of a page, also kept as `artefacts/NAME.png`."""
    with opened(page.as_uri()) as window:
        window.resize(width, height, dark)
        return window.screenshot(name)


@contextlib.contextmanager
def opened(url: str) -> Iterator[Window]:
    """A page in a Chromium of its own for the body, loaded."""
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        command = [
            "chromium",
            *_OPTIONS.split(),
            f"--user-data-dir={profile}",
            "--remote-debugging-port=0",
            "about:blank",
        ]
        chromium = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = _until(lambda: _told_port(Path(profile)), "Chromium's port")
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=WAIT_S) as reply:
                [target] = [target for target in json.load(reply) if target["type"] == "page"]
            with connect(target["webSocketDebuggerUrl"], max_size=None, proxy=None) as socket:
                window = Window(socket)
                window.open(url)
                yield window
        finally:
            chromium.terminate()
            chromium.wait(timeout=WAIT_S)


def _told_port(profile: Path) -> str:
    told = profile / "DevToolsActivePort"
    return told.read_text().partition("\n")[0] if told.exists() else ""


def _until(ask: Any, what: str) -> Any:
    """What `ask` returns, as soon as that is true."""
    ends_s = time.monotonic() + WAIT_S
    while not (value := ask()):
        assert time.monotonic() < ends_s, f"after {WAIT_S:g} s still waiting for {what}"
        time.sleep(0.02)
    return value


class Window:
    """A page driven over the DevTools protocol, by what people do: keys, clicks, files."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._sent = 0
        self.url = ""
        self.requests: list[str] = []  # addresses that the page has asked for
        self.complaints: list[str] = []  # errors on its console
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._sent += 1
        self._socket.send(json.dumps({"id": self._sent, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == self._sent:
                assert "error" not in message, f"{method}: {message}"
                return message["result"]
            self._note(message.get("method"), message.get("params"))

    def _note(self, method: str | None, event: dict[str, Any]) -> None:
        match method:
            case "Network.requestWillBeSent":
                self.requests.append(event["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(str(event["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if event["type"] in ("error", "warning"):
                self.complaints.append(str(event["args"]))
            case "Log.entryAdded" if event["entry"]["level"] in ("error", "warning"):
                self.complaints.append(f"{event['entry']['text']} {event['entry'].get('url', '')}")

    def open(self, url: str) -> None:
        self.url = url
        self.call("Page.navigate", url=url)
        self.until(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def ask(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, f"{script}: {result['exceptionDetails']}"
        return result["result"].get("value")

    def until(self, script: str) -> Any:
        """The value of a JavaScript expression, as soon as that is true."""
        return _until(lambda: self.ask(script), script)

    def text(self, selector: str) -> str:
        """What is seen of an element's text; "" of a hidden one."""
        return self.ask(f"document.querySelector({json.dumps(selector)}).innerText")

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of an element in the window, in px."""
        rectangle = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        return tuple(self.ask(f"(({{left, top, right, bottom}}) => [left, top, right, bottom])({rectangle})"))

    def draw(self) -> None:
        """Wait until what has changed is on the screen."""
        self.ask("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def choose_file(self, selector: str, path: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def write(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        code, text = KEYS[key]
        pressed = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **pressed)
        self.call("Input.dispatchKeyEvent", type="keyUp", **pressed)

    def point(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        self.ask(
            f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center', behavior: 'instant'}})"
        )
        _until(lambda: self.box(selector) == (self.draw(), self.box(selector))[1], f"{selector} to stand still")
        left, top, right, bottom = self.box(selector)
        x, y = (left + right) / 2, (top + bottom) / 2
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def resize(self, width: int, height: int, dark: bool = False, still: bool = False) -> None:
        """The window in px, and what its owner prefers: dark colours, nothing that moves."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        prefers = {
            "color-scheme": "dark" if dark else "light",
            "reduced-motion": "reduce" if still else "no-preference",
        }
        features = [{"name": f"prefers-{name}", "value": value} for name, value in prefers.items()]
        self.call("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, name: str, whole: bool = False) -> Image.Image:
        """What the window shows, or the whole page, also kept as `artefacts/NAME.png`."""
        ARTEFACTS.mkdir(exist_ok=True)
        shot = ARTEFACTS / f"{name}.png"
        self.draw()
        shot.write_bytes(b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]))
        return Image.open(shot).convert("RGB")


def num_saturated_colours(picture: Image.Image) -> int:
    """How many colours are far from grey: photographs and depth maps have dozens that no text or background has."""
    colours = picture.getcolors(1 << 24) or []
    return sum(max(pixel) - min(pixel) > 90 for _, pixel in colours)
