"""Requests that must be refused, as data: what is sent, and the status and word that must come back.

Contents are built when they are sent, so that bodies of 60 MB are not all in memory. Statuses hold for the default
limits of `ServeConfig`.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from PIL import Image
from serve_fakes import encoded

KEY = "sk-Of-Alice-5e1f"
BEARER = {"Authorization": f"Bearer {KEY}"}
JSON = BEARER | {"Content-Type": "application/json"}
SIF, CHAT = "/v1/sif", "/v1/chat/completions"
NOT_HTTP = "Invalid HTTP request"  # what the web server itself says, as text

Content = Callable[[], bytes | Iterator[bytes]]


@dataclass(frozen=True)
class Bad:
    name: str
    status: int
    word: str  # in the message
    content: Content = bytes
    path: str = SIF
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=lambda: JSON)


@dataclass(frozen=True)
class BadBytes:
    """What HTTP libraries would not send."""

    name: str
    status: int  # 0 = the connection is closed without a reply
    word: str
    sent: bytes
    then_closed: bool = False  # by the client, which therefore reads no reply


# --- parts of requests ------------------------------------------------------------------------------------------------


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def text_part(text: Any = "What is red?") -> dict[str, Any]:
    return {"type": "text", "text": text}


def image_part(url: Any = None) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64_of(encoded())}" if url is None else url
    return {"type": "image_url", "image_url": {"url": url}}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def good_sif() -> dict[str, Any]:
    return {"image": base64_of(encoded()), "question": "What is red?"}


def good_chat() -> dict[str, Any]:
    return {"model": "sif", "messages": [user(image_part(), text_part())]}


def dumped(body: Any) -> bytes:
    return json.dumps(body).encode()


def form_part(name: str, data: bytes, kind: str = "", filename: str | None = None) -> bytes:
    head = f'Content-Disposition: form-data; name="{name}"'
    head += "" if filename is None else f'; filename="{filename}"'
    head += f"\r\nContent-Type: {kind}" if kind else ""
    return f"{head}\r\n\r\n".encode() + data


def form_body(*parts: bytes) -> bytes:
    return b"".join(b"--sif\r\n" + part + b"\r\n" for part in parts) + b"--sif--\r\n"


IMAGE, QUESTION = form_part("image", encoded(), "image/png", "photo.png"), form_part("question", b"What is red?")
FORM = BEARER | {"Content-Type": "multipart/form-data; boundary=sif"}


# --- cases in one line ------------------------------------------------------------------------------------------------


def sif(name: str, status: int, word: str, **changes: Any) -> Bad:
    """JSON of `POST /v1/sif` with other values; `...` leaves a field out."""
    body = {key: value for key, value in (good_sif() | changes).items() if value is not ...}
    return Bad(f"sif: {name}", status, word, partial(dumped, body))


def chat(name: str, status: int, word: str, **changes: Any) -> Bad:
    """As `sif`, of a chat."""
    body = {key: value for key, value in (good_chat() | changes).items() if value is not ...}
    return Bad(f"chat: {name}", status, word, partial(dumped, body), CHAT)


def plain(name: str, status: int, word: str, *messages: Any) -> Bad:
    return chat(f"plain, {name}", status, word, model="sif-plain", messages=list(messages))


def url(name: str, status: int, word: str, address: str) -> Bad:
    return chat(f"image URL, {name}", status, word, messages=[user(image_part(address), text_part())])


def body(name: str, status: int, word: str, content: bytes | Content, path: str = SIF, **headers: str) -> Bad:
    """Any bytes as a body; headers with _ for -, JSON's content type by default."""
    sent = JSON | {key.replace("_", "-"): value for key, value in headers.items()}
    build = content if callable(content) else partial(bytes, content)
    return Bad(f"body: {name}", status, word, build, path, headers=sent)


def form(name: str, status: int, word: str, *parts: bytes, kind: str = FORM["Content-Type"]) -> Bad:
    return Bad(f"form: {name}", status, word, partial(form_body, *parts), headers=BEARER | {"Content-Type": kind})


def image(name: str, status: int, word: str, build: Callable[[], bytes]) -> Bad:
    """An image as the file of a form."""

    def content() -> bytes:
        return form_body(form_part("image", build(), "image/png", "photo.png"), QUESTION)

    return Bad(f"image: {name}", status, word, content, headers=FORM)


def auth(name: str, method: str = "GET", path: str = "/v1/models", word: str = "not known", **headers: str) -> Bad:
    return Bad(f"key: {name}", 401, word, path=path, method=method, headers=headers)


def route(method: str, path: str, status: int) -> Bad:
    return Bad(f"route: {method} {path}", status, "" if method == "HEAD" else method, path=path, method=method)


# --- images -----------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def promised_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def zeros(size: int) -> bytes:
    """Compressed, a megabyte at a time: the sender should not need the memory either."""
    compressor = zlib.compressobj(9)
    parts = [compressor.compress(bytes(min(1_000_000, size - start))) for start in range(0, size, 1_000_000)]
    return b"".join(parts) + compressor.flush()


def whole_png(side_px: int) -> bytes:
    """Black, one bit a pixel, complete: a hundred kilobytes that decode to side² pixels."""
    header = struct.pack(">IIBBBBB", side_px, side_px, 1, 0, 0, 0, 0)
    rows = zeros(side_px * (1 + side_px // 8))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def png_with(kind: bytes, head: bytes, size: int = 200_000_000) -> bytes:
    """A small PNG with a chunk that decompresses to `size` bytes."""
    png = encoded()
    return png[:33] + chunk(kind, head + zeros(size)) + png[33:]


def without_palette() -> bytes:
    png = encoded(mode="P")
    at = png.index(b"PLTE") - 4
    [size] = struct.unpack(">I", png[at : at + 4])
    return png[:at] + png[at + 12 + size :]


def many_scans(count: int) -> bytes:
    """A progressive JPEG of 38 million pixels; every scan of 60 bytes makes the decoder go over all of them."""
    jpeg = encoded((16_000, 2_400), "JPEG", progressive=True)
    scan = jpeg[jpeg.rfind(b"\xff\xda") : -2]
    return jpeg[:-2] + count * scan + b"\xff\xd9"


def wide_webp() -> bytes:
    """An animation of 16 x 16 pixels on a canvas of 16,383 x 16,383."""
    webp = bytearray(encoded((16, 16), "WEBP", save_all=True, append_images=[Image.new("RGB", (16, 16))]))
    at = webp.index(b"VP8X") + 12
    webp[at : at + 6] = 2 * struct.pack("<I", 16_382)[:3]
    return bytes(webp)


def cut(form: str, part: float, size: tuple[int, int] = (64, 48)) -> bytes:
    whole = encoded(size, form)
    return whole[: int(part * len(whole))]


def damaged(form: str, at: int, size: int = 16) -> bytes:
    whole = bytearray(encoded((64, 48), form))
    whole[at : at + size] = bytes(byte ^ 0xFF for byte in whole[at : at + size])
    return bytes(whole)


def zipped() -> bytes:
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("photo.png", bytes(10_000_000))
    return buffer.getvalue()


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'


def in_pieces(size: int) -> Iterator[bytes]:
    """Sent without a length."""
    for _ in range(size // 1_000_000):
        yield b"x" * 1_000_000


# --- the table --------------------------------------------------------------------------------------------------------

KEYS = [
    auth("none", word="no API key"),
    auth("empty", Authorization="", word="no API key"),
    auth("none, form", "POST", SIF, "no API key", **{"Content-Type": FORM["Content-Type"]}),
    auth("none, chat", "POST", CHAT, "no API key", **{"Content-Type": "application/json"}),
    auth("wrong, sif", "POST", SIF, Authorization="Bearer sk-wrong"),
    auth("wrong, chat", "POST", CHAT, Authorization="Bearer sk-wrong"),
    auth("in the query", path=f"/v1/models?api_key={KEY}", word="no API key"),
    auth("in another header", word="no API key", **{"X-Api-Key": KEY}),
    auth("in a cookie", word="no API key", Cookie=f"Authorization={KEY}"),
    *(
        auth(f"header {value.replace(KEY, 'KEY')!r}", Authorization=value)
        for value in (
            "Bearer",
            "Bearer sk-wrong",
            KEY,
            f"Basic {KEY}",
            f"Basic {base64_of(f'alice:{KEY}'.encode())}",
            f"Token {KEY}",
            f"Bearer {KEY.upper()}",
            f"Bearer {KEY.lower()}",
            f"Bearer {KEY[:-1]}",
            f"Bearer {KEY}x",
            f'Bearer "{KEY}"',
            f"Bearer alice:{KEY}",
            f"Bearer Bearer {KEY}",
            f"Bearer {KEY}, Bearer {KEY}",
            f"Bearer\t{KEY}",
            f"Bearer={KEY}",
        )
    ),
]

ROUTES = [
    *(route(method, SIF, 405) for method in ("GET", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE")),
    *(route(method, CHAT, 405) for method in ("GET", "PUT", "DELETE", "OPTIONS", "HEAD")),
    *(route(method, "/v1/models", 405) for method in ("POST", "DELETE")),
    route("POST", "/healthz", 405),
    *(route("GET", path, 404) for path in ("/page/../api.py", "/v1", "/v2/sif", "/.env", "/nothing?x=%ff", "/%00")),
    route("GET", "/%ff%fe", 404),
    *(route("GET", path, 404) for path in ("/v1/models/sif", "/V1/MODELS", "//v1/models", "/v1/sif/../../etc/passwd")),
    *(route("POST", path, 404) for path in ("/v1/completions", "/v1/embeddings", "/v1/sif/x", "/v1/chat")),
    route("GET", "/" + 5000 * "x", 404),
]

SIF_FIELDS = [
    sif("no image", 422, "image", image=...),
    sif("no question", 422, "question", question=...),
    sif("nothing", 422, "image", image=..., question=...),
    *(sif(f"image {value!r}", 422, "image", image=value) for value in (None, 3, True, 1.5, [], {}, ["AAAA"])),
    *(sif(f"question {value!r}", 422, "question", question=value) for value in (None, 3, False, [], {"text": "?"})),
    *(sif(f"another field {name!r}", 422, name, **{name: "x"}) for name in ("adapter", "Image", "image_url")),
    sif("unknown model", 404, "'gpt' is not served; there are sif", model="gpt"),
    sif("model of another API", 404, "not served", model="sif-plain"),
    *(sif(f"blank question {value!r}", 422, "blank", question=value) for value in ("", " ", "\n\t", "\u3000")),
    sif("question with NUL", 422, "NUL", question="What\0is red?"),
    sif("question of 8001 characters", 413, "8001 characters", question="x" * 8001),
    sif("question of 1 MB", 413, "1000000 characters", question="x" * 1_000_000),
    sif("field name of 100 kB", 422, "xxx", **{"x" * 100_000: 1}),
    sif("empty image", 400, "empty", image=""),
    *(
        sif(f"base64 {value[:20]!r}", 400, "base64", image=value)
        for value in ("***", "AAA", "A", "====", "AA AA", "AAAA\n", "_-_-", "äöü", "QUJD\0", base64_of(encoded())[1:])
    ),
    sif("an address", 400, "not fetched", image="http://127.0.0.1/x.png"),
    sif("text as base64", 400, "none of PNG", image=base64_of(b"no image at all")),
]

URLS = [
    *(
        url(f"{address}", 400, "not fetched", address)
        for address in (
            "http://127.0.0.1/x.png",
            "http://localhost:8000/healthz",
            "HTTP://127.0.0.1/x.png",
            "http://169.254.169.254/latest/meta-data/",
            "http://[::1]/x.png",
            "http://0x7f000001/",
            "https://example.org/cat.png",
            "file:///etc/passwd",
            "FILE:///etc/passwd",
            "file:/etc/passwd",
            "ftp://127.0.0.1/x.png",
            "gopher://127.0.0.1:6379/_INFO",
            "s3://bucket/x.png",
            "jar:http://127.0.0.1!/x.png",
            "javascript:alert(1)",
        )
    ),
    *(url(path, 400, "base64", path) for path in ("//127.0.0.1/x.png", "/etc/passwd", "../x.png", "\\\\host\\x.png")),
    *(url(text, 400, ";base64,", text) for text in ("data:", "data:,", "data:image/png,abc", "data:image/png;base64")),
    url("data without anything", 400, "empty", "data:image/png;base64,"),
    url("data not base64", 400, "not base64", "data:image/png;base64,***"),
    url("data within data", 400, "not base64", "data:image/png;base64,data:image/png;base64,AAAA"),
    url("SVG", 400, "none of PNG", "data:image/svg+xml;base64," + base64_of(SVG)),
    url("HTML", 400, "none of PNG", "data:text/html;base64," + base64_of(b"<script>alert(1)</script>")),
    url("GIF", 400, "none of PNG", "data:image/gif;base64," + base64_of(encoded(form="GIF"))),
    url("bomb", 413, "pixels", "data:image/png;base64," + base64_of(promised_png(40_000, 40_000))),
]

WRONG_VALUES: dict[str, list[Any]] = {
    "model": [None, 7, True, [], {}],
    "messages": [
        None,
        "What is red?",
        {},
        [],
        [None],
        ["What is red?"],
        [[]],
        [{}],
        65 * [{"role": "user", "content": "?"}],
    ],
    "stream": ["true", "yes", 1, 0, [], {}],
    "stream_options": [True, "x", [], {"include_usage": 1}, {"other": True}],
    "temperature": ["1", True, -0.1, 2.1, [], {}, float("nan"), float("inf"), float("-inf")],
    "top_p": ["0.5", True, 0, -1, 1.01, [], float("nan")],
    "max_tokens": ["5", True, 0, -1, 1.5, [], float("nan"), float("inf")],
    "max_completion_tokens": ["5", True, 0, -1, 1.5, {}],
    "seed": ["3", True, 1.5, [], 2**63, -(2**63) - 1, 10**400, float("nan")],
    "n": ["1", True, 0, 2, 1.5, []],
    "stop": ["x", ["x"], [], 3, False],
    "logprobs": [True, "no", 5, 0],
    "frequency_penalty": [0.5, -1, "0", True, float("nan")],
    "presence_penalty": [2, -0.1, "0", True],
    "response_format": ["json", {"type": "json_object"}, {"type": "json_schema", "json_schema": {}}, [], {}],
}

NOT_SERVED: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "auto",
    "functions": [],
    "function_call": "none",
    "parallel_tool_calls": True,
    "logit_bias": {"1": 100},
    "top_logprobs": 5,
    "modalities": ["audio"],
    "audio": {},
    "reasoning_effort": "high",
    "service_tier": "flex",
    "prediction": {},
    "web_search_options": {},
    "adapter": "alice/boxes",
    "lora": "x",
    "top_k": 3,
    "best_of": 4,
    "guided_json": {},
    "prompt": "x",
    "Model": "sif",
    "": 1,
}

CHAT_FIELDS = [
    chat("nothing", 422, "model", model=..., messages=...),
    chat("no model", 422, "model", model=...),
    chat("no messages", 422, "messages", messages=...),
    *(
        chat(f"{name} = {json.dumps(value)[:40]}", 422, name, **{name: value})
        for name, values in WRONG_VALUES.items()
        for value in values
    ),
    *(chat(f"not served, {name!r}", 422, name, **{name: value}) for name, value in NOT_SERVED.items()),
    *(
        chat(f"model {model[:20]!r}", 404, "not served; there are sif, sif-plain", model=model)
        for model in ("gpt-4o", "", "SIF", " sif", "sif:boxes", "sif/boxes", "../policy", "sif\0", "x" * 1_000_000)
    ),
]

MESSAGES = [
    *(
        chat(f"role {role!r}", 422, "role", messages=[{"role": role, "content": "?"}])
        for role in ("tool", "function", "developer", "USER", "", None, 3)
    ),
    chat("no role", 422, "role", messages=[{"content": "?"}]),
    chat("no content", 422, "content", messages=[{"role": "user"}]),
    *(
        chat(f"content {value!r}", 422, "messages.0.content", messages=[{"role": "user", "content": value}])
        for value in (None, 3, True, {"type": "text"}, [None], ["?"], [[]], [{}], [{"text": "?"}])
    ),
    chat("tool calls", 422, "tool_calls", messages=[{"role": "assistant", "content": "?", "tool_calls": []}]),
    chat("name of a number", 422, "name", messages=[{"role": "user", "content": "?", "name": 3}]),
    *(
        chat(f"part {kind!r}", 422, "type", messages=[user({"type": kind})])
        for kind in ("video_url", "input_audio", "image", "file", "refusal", "", None, 3, "x" * 100_000)
    ),
    *(chat(f"text {value!r}", 422, "text", messages=[user(text_part(value))]) for value in (None, 3, [], {})),
    chat("text and image in one", 422, "image_url", messages=[user(image_part() | text_part())]),
    *(
        chat(f"image_url {value!r}", 422, "image_url", messages=[user({"type": "image_url", "image_url": value})])
        for value in (None, "data:image/png;base64,AAAA", [], {}, {"url": None}, {"url": 3}, {"url": ["x"]})
    ),
    chat("detail", 422, "detail", messages=[user({"type": "image_url", "image_url": {"url": "x", "detail": "ultra"}})]),
    chat("no image", 422, "one image", messages=[user(text_part())]),
    chat("text alone", 422, "one image", messages=[{"role": "user", "content": "What is red?"}]),
    chat("no parts", 422, "one image", messages=[user()]),
    chat("two images", 422, "one image", messages=[user(image_part(), image_part(), text_part())]),
    chat("a system message", 422, "one user", messages=[{"role": "system", "content": "?"}, user(image_part())]),
    chat("an image of the system", 422, "one user message", messages=[{"role": "system", "content": [image_part()]}]),
    chat("two turns", 422, "one user message", messages=2 * [user(image_part(), text_part())]),
    chat("no text", 422, "blank", messages=[user(image_part())]),
    chat("empty text", 422, "blank", messages=[user(image_part(), text_part(""))]),
    chat("blank texts", 422, "blank", messages=[user(text_part(" "), image_part(), text_part("\n"))]),
    chat("NUL", 422, "NUL", messages=[user(image_part(), text_part("a\0b"))]),
    chat("text of 1 MB", 413, "1000000 characters", messages=[user(image_part(), text_part("x" * 1_000_000))]),
    chat("10,000 parts", 413, "10000 characters", messages=[user(image_part(), *(10_000 * [text_part("x")]))]),
    chat("streamed, no image", 422, "one image", messages=[user(text_part())], stream=True),
    chat("streamed, unknown model", 404, "not served", model="gpt-4o", stream=True),
    plain("no image", 422, "0 images", user(text_part())),
    plain("three images", 422, "3 images", user(*3 * [image_part()], text_part())),
    plain("1000 images", 422, "1000 images", user(*1000 * [image_part("AAAA")])),
    plain("second image broken", 400, "none of PNG", user(image_part(), image_part("AAAA"))),
    plain("NUL", 422, "NUL", user(image_part()), {"role": "assistant", "content": "a\0b"}),
    plain("long together", 413, "8002 characters", *2 * [user(image_part(), text_part("x" * 4001))]),
    plain("65 messages", 422, "64 items", *65 * [user(image_part(), text_part())]),
]

DEEP = b"[" * 100_000
BODIES = [
    *(
        body(f"{name}, {path}", 422, word, content, path)
        for path in (SIF, CHAT)
        for name, word, content in (
            ("empty", "JSON", b""),
            ("no JSON", "JSON", b"hello"),
            ("cut", "JSON", dumped(good_sif())[:-1]),
            ("more behind", "JSON", dumped(good_sif()) + b"}"),
            ("null", "request", b"null"),
            ("number", "request", b"1e999"),
            ("text", "request", b'"hello"'),
            ("list", "request", b"[]"),
            ("deep", "JSON", DEEP),
            ("deep objects", "JSON", b'{"image":' * 100_000),
            ("single quotes", "JSON", b"{'image': ''}"),
            ("UTF-16", "JSON", '{"image": ""}'.encode("utf-16")),
            ("byte order mark", "JSON", b"\xef\xbb\xbf" + dumped(good_sif())),
            ("not UTF-8", "JSON", b'{"question": "\xff"}'),
            ("half a surrogate", "JSON", rb'{"question": "\ud800"}'),
            ("line break in a text", "JSON", b'{"question": "\n"}'),
        )
    ),
    body("deep metadata", 422, "JSON", b'{"metadata": ' + DEEP, CHAT),
    body("1e999 as temperature", 422, "temperature", dumped(good_chat())[:-1] + b', "temperature": 1e999}', CHAT),
    body("a seed of 5000 digits", 422, "", b'{"model": "sif", "messages": [], "seed": ' + b"9" * 5000 + b"}", CHAT),
    *(
        body(f"{kind!r}, {path}", 415, "content-type", b"hello", path, Content_Type=kind)
        for path in (SIF, CHAT)
        for kind in (
            "",
            "text/plain",
            "application/x-www-form-urlencoded",
            "image/png",
            "application/jsonl",
            "x" * 5000,
        )
    ),
    body("form to chat", 415, "content-type", form_body(IMAGE, QUESTION), CHAT, Content_Type=FORM["Content-Type"]),
    body("mixed parts", 415, "content-type", form_body(IMAGE, QUESTION), Content_Type="multipart/mixed; boundary=sif"),
    body("form said to be JSON", 422, "JSON", form_body(IMAGE, QUESTION)),
    body("JSON said to be a form", 400, "form", dumped(good_sif()), Content_Type=FORM["Content-Type"]),
    *(
        body(f"{coding}, {path}", 415, "content-encoding", gzip.compress(b"{}"), path, Content_Encoding=coding)
        for path in (SIF, CHAT)
        for coding in ("gzip", "deflate", "br", "zstd", "gzip, gzip")
    ),
    body("10 million values", 413, "values", lambda: b"[" + b"1," * 10_000_000 + b"1]"),
    body("10 million parts", 413, "values", lambda: b'{"messages":[{"content":[' + b"1," * 10_000_000, CHAT),
    body("4 million lists", 413, "values", lambda: b'{"metadata":[' + b"[[]]," * 4_000_000 + b"1]}", CHAT),
    body("a million fields", 413, "values", lambda: dumped(dict.fromkeys(map(str, range(1_000_000)), 1)), CHAT),
    body("gzip bomb", 415, "content-encoding", lambda: gzip.compress(bytes(50_000_000)), Content_Encoding="gzip"),
    body("60 MB", 413, "bytes", lambda: b"x" * 60_000_000),
    body("60 MB, chat", 413, "bytes", lambda: b"x" * 60_000_000, CHAT),
    body("60 MB without a length", 413, "bytes", lambda: in_pieces(60_000_000)),
    body("60 MB without a length, chat", 413, "bytes", lambda: in_pieces(60_000_000), CHAT),
    body("60 MB as a form", 413, "bytes", lambda: form_body(b"x" * 60_000_000), Content_Type=FORM["Content-Type"]),
]

INNER, INNER_KIND = form_body(IMAGE).replace(b"--sif", b"--inner"), "multipart/form-data; boundary=inner"
IN_BASE64 = b"Content-Transfer-Encoding: base64\r\n" + form_part("image", base64.b64encode(encoded()), filename="x")
FORMS = [
    form("nothing", 422, "image"),
    form("no image", 422, "image", QUESTION),
    form("no question", 422, "question", IMAGE),
    form("other names", 422, "image", form_part("photo", b"x", filename="x"), form_part("text", b"?")),
    form("names in capitals", 422, "image", form_part("Image", b"x", filename="x"), form_part("Question", b"?")),
    form("image as text", 422, "image", form_part("image", encoded()), QUESTION),
    form("image as text alone", 422, "image", form_part("image", base64_of(encoded()).encode())),
    form("question as file", 400, "files", IMAGE, form_part("question", b"?", "text/plain", "question.txt")),
    form("swapped", 422, "image", form_part("image", b"?"), form_part("question", encoded(), filename="x")),
    form("two images", 400, "files", IMAGE, IMAGE, QUESTION),
    form("two questions", 422, "twice", IMAGE, QUESTION, QUESTION),
    form("another field", 422, "adapter", IMAGE, QUESTION, form_part("adapter", b"x")),
    form("unknown model", 404, "not served", IMAGE, QUESTION, form_part("model", b"gpt")),
    form("model as file", 400, "files", IMAGE, QUESTION, form_part("model", b"sif", filename="x")),
    form("four fields", 400, "fields", IMAGE, QUESTION, form_part("model", b"sif"), form_part("x", b"x")),
    form("10,000 parts", 400, "fields", IMAGE, *(10_000 * [QUESTION])),
    form("10,000 files", 400, "files", *(10_000 * [IMAGE])),
    form("empty image", 400, "empty", form_part("image", b"", filename=""), QUESTION),
    form("blank question", 422, "blank", IMAGE, form_part("question", b" \r\n ")),
    form("question of 1 MB", 413, "1000000 characters", IMAGE, form_part("question", b"x" * 1_000_000)),
    form("question in UTF-16", 422, "NUL", IMAGE, form_part("question", "What is red?".encode("utf-16"))),
    form("NUL in a question", 422, "NUL", IMAGE, form_part("question", b"a\0b")),
    form("NUL in a name", 422, "image", form_part("im\0age", encoded(), filename="x"), QUESTION),
    form("part without a name", 400, "name", b"Content-Disposition: form-data\r\n\r\nx"),
    form("part without headers", 400, "name", b"\r\nx"),
    form("part of headers only", 400, "form", b"Content-Type: image/png"),
    form("header of 10 kB", 400, "form", b"X: " + b"x" * 10_000 + b"\r\n" + IMAGE, QUESTION),
    form("100 headers in a part", 400, "form", 100 * b"X: x\r\n" + IMAGE, QUESTION),
    form("form in the form", 400, "none of PNG", form_part("image", INNER, INNER_KIND, "x"), QUESTION),
    form("image in base64", 400, "none of PNG", IN_BASE64, QUESTION),
    body("form not closed", 422, "question", form_body(IMAGE, QUESTION)[:-12], Content_Type=FORM["Content-Type"]),
    form("another boundary", 400, "form", IMAGE, QUESTION, kind="multipart/form-data; boundary=other"),
    form("no boundary", 400, "boundary", IMAGE, QUESTION, kind="multipart/form-data"),
    form("empty boundary", 400, "form", IMAGE, QUESTION, kind="multipart/form-data; boundary="),
    form("boundary of 5 kB", 400, "form", IMAGE, QUESTION, kind="multipart/form-data; boundary=" + "x" * 5000),
    form("charset without texts", 400, "form", IMAGE, QUESTION, kind=FORM["Content-Type"] + "; charset=undefined"),
]

FRAME = Image.new("RGB", (40, 30))
FORMATS = ("PNG", "JPEG", "WEBP")
IMAGES = [
    *(
        image(f"{name} cut to {part:.0%}", 400, "image_unreadable", partial(cut, name, part))
        for name in FORMATS
        for part in (0.1, 0.4, 0.7)
    ),
    *(
        image(f"{name}, wrong from byte {at}", 400, "image_unreadable", partial(damaged, name, at))
        for name in FORMATS
        for at in (0, 8)
    ),
    image("PNG, wrong header", 400, "image_unreadable", partial(damaged, "PNG", 16)),
    image("PNG, wrong pixels", 400, "image_unreadable", partial(damaged, "PNG", 45)),
    image("PNG without its palette", 400, "image_unreadable", without_palette),
    image("JPEG, wrong tables", 400, "image_unreadable", partial(damaged, "JPEG", 20)),
    image("WebP, wrong frame", 400, "image_unreadable", partial(damaged, "WEBP", 20)),
    *(
        image(name, 400, "none of PNG", partial(encoded, form=name))
        for name in ("GIF", "BMP", "TIFF", "ICO", "PDF", "PPM", "TGA", "JPEG2000", "ICNS", "AVIF")
    ),
    *(
        image(name, 400, "none of PNG", partial(bytes, content))
        for name, content in (
            ("SVG", SVG),
            ("HTML", b"<!doctype html><script>alert(1)</script>"),
            ("PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run"),
            ("text", b"What is red?"),
            ("zeros", bytes(100)),
            ("one byte", b"\x89"),
            ("PNG signature alone", b"\x89PNG\r\n\x1a\n"),
            ("space before a PNG", b" " + encoded()),
            ("gzipped PNG", gzip.compress(encoded())),
            ("base64 of a PNG", base64.b64encode(encoded())),
        )
    ),
    image("JPEG signature alone", 400, "image_unreadable", lambda: b"\xff\xd8\xff"),
    image("WebP signature alone", 400, "image_unreadable", lambda: b"RIFF\x00\x00\x00\x00WEBP"),
    image("zip", 400, "none of PNG", zipped),
    image("animated GIF", 400, "none of PNG", partial(encoded, form="GIF", save_all=True, append_images=[FRAME])),
    *(
        image(f"PNG header of {width} x {height}", 400, "image_unreadable", partial(promised_png, width, height))
        for width, height in ((0, 0), (0, 40), (40, 0), (40, 30))
    ),
    *(
        image(f"PNG header of {width} x {height}", 413, "pixels", partial(promised_png, width, height))
        for width, height in ((40_000, 40_000), (2**31 - 1, 2**31 - 1), (9_000, 9_000), (1, 2**31 - 1))
    ),
    image("PNG of 40,000 x 40,000", 413, "pixels", partial(whole_png, 40_000)),
    image("PNG of 7,000 x 7,000", 413, "7000 x 7000 pixels", partial(whole_png, 7_000)),
    image("WebP canvas of 16,383 x 16,383", 413, "pixels", wide_webp),
    image("PNG text bomb", 400, "image_unreadable", partial(png_with, b"zTXt", b"a\0\0")),
    image("PNG international text bomb", 400, "image_unreadable", partial(png_with, b"iTXt", b"a\0\1\0\0\0")),
    image("PNG colour profile bomb", 400, "image_unreadable", partial(png_with, b"iCCP", b"a\0\0")),
    image("JPEG of 10,000 scans", 413, "scans", partial(many_scans, 10_000)),
    image("strip of 1 x 10,000", 422, "image_too_thin", partial(encoded, (1, 10_000))),
    image("strip of 10,000 x 1", 422, "image_too_thin", partial(encoded, (10_000, 1), "JPEG")),
    image("strip of 81 x 10", 422, "image_too_thin", partial(encoded, (81, 10), "WEBP")),
    image("20 MB behind a PNG", 413, "image has", lambda: encoded() + bytes(20_000_000)),
]

FOR_ENGINE = [
    *(
        sif(f"question with {token}", 422, "placeholder", question=f"What is {token} red?")
        for token in ("<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>", 5 * "<|image_pad|>")
    ),
    sif("question longer than the engine's prompts", 422, "leaves no room", question=1500 * "ball "),
    plain("placeholder", 422, "placeholder", user(image_part(), text_part("<|image_pad|>"))),
    plain("long", 422, "leaves no room", user(image_part(), text_part(1500 * "ball "))),
]
"""What only a real policy refuses."""

TABLE = [*KEYS, *ROUTES, *SIF_FIELDS, *URLS, *CHAT_FIELDS, *MESSAGES, *BODIES, *FORMS, *IMAGES]


UNUSUAL = [
    body("two spaces before the key", 200, "", dumped(good_sif()), Authorization=f"bearer  {KEY}"),
    body("a content type with more", 200, "", dumped(good_sif()), Content_Type="Application/JSON; charset=utf-8"),
    body("commas", 200, "", dumped(good_sif() | {"question": 8000 * ","})),
    url("DATA:", 200, "", "DATA:image/png;base64," + base64_of(encoded())),
    chat("the ends of ranges", 200, "", temperature=2, top_p=1, max_tokens=10**30, seed=-(2**63), n=1, logprobs=False),
    chat("nulls", 200, "", temperature=None, top_p=None, max_tokens=None, seed=None, n=None, stop=None, metadata={}),
    form("question first", 200, "", QUESTION, IMAGE),
    *(
        image(name, 200, "", partial(encoded, **options))
        for name, options in {
            "progressive JPEG": {"form": "JPEG", "progressive": True},
            "CMYK JPEG": {"form": "JPEG", "mode": "CMYK"},
            "JPEG with another behind": {"form": "MPO", "save_all": True, "append_images": [FRAME]},
            "16-bit PNG": {"mode": "I;16"},
            "indexed PNG": {"mode": "P", "transparency": b"abc"},
            "animated PNG": {"save_all": True, "append_images": [FRAME]},
            "animated WebP": {"form": "WEBP", "save_all": True, "append_images": [FRAME]},
        }.items()
    ),
]
"""To be answered, so that what keeps the others out does not keep out these."""


def raw(
    name: str, status: int, word: str, *head: str | bytes, content: bytes = b"", then_closed: bool = False
) -> BadBytes:
    lines = [line.encode() if isinstance(line, str) else line for line in head]
    return BadBytes(name, status, word, b"\r\n".join(lines) + b"\r\n\r\n" + content, then_closed)


POST, HOST, ALICE = f"POST {SIF} HTTP/1.1", "Host: sif", f"Authorization: Bearer {KEY}"
AS_JSON, CHUNKED, TWO_BYTES = "Content-Type: application/json", "Transfer-Encoding: chunked", "Content-Length: 2"
ASKS = (POST, HOST, ALICE, AS_JSON)

RAW = [
    BadBytes("no HTTP", 400, NOT_HTTP, b"hello\r\n\r\n"),
    BadBytes("TLS", 400, NOT_HTTP, bytes.fromhex("16030100a5010000a10303") + bytes(100)),
    BadBytes("HTTP/2", 400, NOT_HTTP, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    raw("HTTP/9.9", 400, NOT_HTTP, f"GET {SIF} HTTP/9.9", HOST),
    raw("unknown method", 400, NOT_HTTP, f"FROB {SIF} HTTP/1.1", HOST),
    raw("NUL in a header", 400, NOT_HTTP, POST, HOST, "X: a\0b"),
    raw("header without a colon", 400, NOT_HTTP, POST, HOST, "hello"),
    raw("length of a word", 400, NOT_HTTP, POST, HOST, "Content-Length: ten"),
    raw("length below zero", 400, NOT_HTTP, POST, HOST, "Content-Length: -1"),
    raw("two lengths", 400, NOT_HTTP, POST, HOST, "Content-Length: 1", TWO_BYTES, content=b"{}"),
    raw("length and chunks", 400, NOT_HTTP, POST, HOST, CHUNKED, TWO_BYTES, content=b"{}"),
    raw("tunnel", 400, NOT_HTTP, "CONNECT 127.0.0.1:22 HTTP/1.1", HOST),
    raw("no length", 422, "JSON", *ASKS),
    raw("length too short", 400, NOT_HTTP, *ASKS, "Content-Length: 5", content=dumped(good_sif())),
    raw("length too long", 0, "", *ASKS, "Content-Length: 999", content=b"{}", then_closed=True),
    raw("no content type", 415, "content-type", POST, HOST, ALICE, TWO_BYTES, content=b"{}"),
    raw("two content types", 415, "text/plain", POST, HOST, ALICE, "Content-Type: text/plain", AS_JSON),
    raw("two keys, wrong first", 401, "not known", POST, HOST, "Authorization: Bearer x", ALICE, AS_JSON),
    raw("key of 100 kB", 401, "not known", POST, HOST, "Authorization: Bearer " + "x" * 100_000),
    raw("key of other bytes", 401, "not known", POST, HOST, b"Authorization: Bearer \xff\xfe\xe4"),
    raw("key in UTF-8", 401, "not known", POST, HOST, "Authorization: Bearer schlüssel"),
    raw("content type of other bytes", 415, "content-type", POST, HOST, ALICE, b"Content-Type: \xff\xfe"),
    raw("HTTP/1.0", 401, "no API key", f"POST {SIF} HTTP/1.0"),
    raw("host of other bytes", 404, "GET /nothing", "GET /nothing HTTP/1.1", b"Host: [\xff"),
    raw("query of other bytes", 400, NOT_HTTP, b"GET /nothing?\xff HTTP/1.1", HOST),
    raw("another host's address", 404, "GET /latest", "GET http://169.254.169.254/latest HTTP/1.1", HOST),
    raw("continue, no key", 401, "no API key", POST, HOST, "Expect: 100-continue", "Content-Length: 99"),
    raw("continue", 422, "JSON", *ASKS, "Expect: 100-continue", TWO_BYTES, content=b"{]"),
    raw("garbage behind", 400, NOT_HTTP, *ASKS, TWO_BYTES, content=b"{]\0\xffhello\r\n\r\n"),
    raw("chunks that are none", 400, NOT_HTTP, *ASKS, CHUNKED, content=b"hello\r\n{}\r\n0\r\n\r\n"),
    raw("chunk of any size", 400, NOT_HTTP, *ASKS, CHUNKED, content=b"f" * 30 + b"\r\n{}"),
    raw("chunk below zero", 400, NOT_HTTP, *ASKS, CHUNKED, content=b"-1\r\n{}"),
    raw("chunks that end", 0, "", *ASKS, CHUNKED, content=b"5\r\n{", then_closed=True),
]
"""What the web server answers by itself is `NOT_HTTP`."""

ENDLESS = raw("body that does not end", 504, "timeout_s", *ASKS, "Content-Length: 1000", content=b"{")
