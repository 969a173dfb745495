"""A teacher and judge behind an OpenAI-compatible API that costs next to nothing: it answers every request after a
fixed time with the trace or the score that the request asks for, found in its body without parsing it or looking at
its images.

As a program it prints its port, serves on loopback until SIGTERM, and then prints {"replied_s": [seconds of every
reply], "most_in_flight": n} as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

STOP_S = 20.0  # for the program to end

# In the words of `method.prompts`, within JSON.
_AREA = re.compile(rb"normalized depth of (\[.{,4000}?\]), as shown")
_ANSWER = re.compile(rb"final gt answer is (.{,4000}?)\. Never mention")
_VERDICT = b'"verdict"'  # name of the form that a judge's reply has
_LENGTH = re.compile(rb"^content-length: *(\d+)\r$", re.IGNORECASE | re.MULTILINE)


@dataclass
class ChatServer:
    """A server that runs, and what it has to say when it has ended."""

    base_url: str
    replied_s: list[float] = field(default_factory=list)  # seconds of a monotonic clock, ascending
    most_in_flight: int = 0


@contextlib.contextmanager
def chat_server(latency_s: float) -> Iterator[ChatServer]:
    """A server in a process of its own for the body. It tells what it saw when the body has ended."""
    command = [sys.executable, "-m", __name__, "--latency-s", str(latency_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            server = ChatServer(f"http://127.0.0.1:{int(process.stdout.readline())}/v1")
            yield server
            process.terminate()
            told = json.loads(process.communicate(timeout=STOP_S)[0])
            server.replied_s, server.most_in_flight = told["replied_s"], told["most_in_flight"]
        finally:
            process.kill()


def reply_to(body: bytes) -> str:
    """The trace that a teacher's request asks for; a score, one of eleven by the request's checksum, for a judge's; a
    word for any other request."""
    if _VERDICT in body:
        return json.dumps({"score": zlib.crc32(body) % 11 / 10})
    areas = [json.loads(b'"' + area + b'"') for area in _AREA.findall(body)]
    answer = _ANSWER.search(body)
    if not areas or not answer:
        return "Green."
    steps = "".join(f"<area>{area}</area>\n<text>Look at part {n}.</text>" for n, area in enumerate(areas))
    text = json.loads(b'"' + answer[1] + b'"')
    return f"```\n<think>{steps}</think>\n<answer>{text}</answer>\n```"


class _Service:
    """What the connections share."""

    def __init__(self, latency_s: float) -> None:
        self._latency_s = latency_s
        self._in_flight = 0
        self.most_in_flight = 0
        self.replied_s: list[float] = []

    def take(self, body: bytes, transport: asyncio.WriteTransport) -> None:
        """Answer a request when its time has come."""
        loop = asyncio.get_running_loop()
        due_s = loop.time() + self._latency_s
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        message = {"role": "assistant", "content": reply_to(body)}
        reply = {
            "id": "bench",
            "object": "chat.completion",
            "created": 0,
            "model": "bench",
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }
        content = json.dumps(reply).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        loop.call_at(due_s, self._reply, head.encode() + content, transport)

    def _reply(self, reply: bytes, transport: asyncio.WriteTransport) -> None:
        self._in_flight -= 1
        self.replied_s.append(asyncio.get_running_loop().time())
        transport.write(reply)


class _Connection(asyncio.Protocol):
    """One connection of HTTP/1.1: a request, its reply, the next request."""

    def __init__(self, service: _Service) -> None:
        self._service = service
        self._received = bytearray()
        self._body: slice | None = None  # of the request that is being received, once its head is there

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._body is None and (head_end := self._received.find(b"\r\n\r\n")) >= 0:
            length = _LENGTH.search(self._received, 0, head_end + 2)
            self._body = slice(head_end + 4, head_end + 4 + int(length[1] if length else 0))
        if self._body is not None and len(self._received) >= self._body.stop:
            body = bytes(self._received[self._body])
            self._received.clear()
            self._body = None
            self._service.take(body, self._transport)


async def _serve(latency_s: float, port: int) -> None:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    service = _Service(latency_s)
    server = await loop.create_server(lambda: _Connection(service), "127.0.0.1", port)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await stopped.wait()
    json.dump({"replied_s": service.replied_s, "most_in_flight": service.most_in_flight}, sys.stdout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency-s", type=float, required=True)
    parser.add_argument("--port", type=int, default=0, help="0 = any that is free")
    options = parser.parse_args()
    asyncio.run(_serve(options.latency_s, options.port))
