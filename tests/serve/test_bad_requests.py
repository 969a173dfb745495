"""Every bad request is refused as the table says, over real sockets, and the server goes on answering."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from http.client import BadStatusLine, HTTPResponse
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from bad_requests import (
    BEARER,
    CHAT,
    ENDLESS,
    FOR_ENGINE,
    KEY,
    NOT_HTTP,
    RAW,
    SIF,
    TABLE,
    UNUSUAL,
    Bad,
    BadBytes,
    good_chat,
    good_sif,
    sif,
    url,
)
from processes import processes_named
from serve_fakes import http_server

from sif_ray.config import EngineConfig, ServeConfig
from sif_ray.serve.stage import serving

TYPES = {401: "authentication_error", 503: "server_error", 504: "server_error"}
MAX_MESSAGE_CHARS = 1100
MAX_GROWTH_BYTES = 600_000_000  # a body of 53 MB, in pieces and whole, and its reading; a bomb would be gigabytes


@dataclass(frozen=True)
class Server:
    base_url: str
    client: httpx.Client
    process: psutil.Process
    idle_bytes: int


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with http_server(ServeConfig(), {"alice": KEY}) as (base_url, process), connected(base_url) as client:
        answer_good(client)
        yield Server(base_url, client, process, peak_bytes(process))


def connected(base_url: str) -> httpx.Client:
    return httpx.Client(base_url=base_url, timeout=300)


def answer_good(client: httpx.Client) -> None:
    for path, body in ((SIF, good_sif()), (CHAT, good_chat())):
        reply = client.post(path, json=body, headers=BEARER)
        assert reply.status_code == 200, reply.text


def put(client: httpx.Client, case: Bad) -> httpx.Response:
    return client.request(case.method, case.path, content=case.content(), headers=case.headers)


def put_bytes(base_url: str, case: BadBytes) -> httpx.Response | None:
    """The first final reply; None where the connection ended without one."""
    with dialled(base_url) as connection:
        connection.sendall(case.sent)
        if case.then_closed:
            connection.shutdown(socket.SHUT_WR)
        return read_reply(connection)


def dialled(base_url: str) -> socket.socket:
    address = urlsplit(base_url)
    return socket.create_connection((address.hostname, address.port), timeout=100)


def read_reply(connection: socket.socket) -> httpx.Response | None:
    with closing(HTTPResponse(connection)) as reply:  # skips 100 Continue
        try:
            reply.begin()
            return httpx.Response(reply.status, headers=reply.getheaders(), content=reply.read())
        except (ConnectionError, BadStatusLine):
            return None


def fault(case: Bad | BadBytes, reply: httpx.Response | None) -> str:
    """What is wrong with the reply; "" if nothing is."""
    if reply is None:
        return "no reply" if case.status else ""
    shown = f"{reply.status_code} {reply.text[:300]}"
    if reply.status_code != case.status or KEY in reply.text:
        return shown
    if case.status in (429, 503) and "retry-after" not in reply.headers:
        return "no Retry-After"
    if case.word == NOT_HTTP:
        return "" if NOT_HTTP in reply.text else shown
    if isinstance(case, Bad) and case.method == "HEAD":
        return "a body" if reply.content else ""
    try:
        body = json.loads(reply.text)
    except ValueError:
        return shown
    error = body.get("error", {})
    kind = TYPES.get(case.status, "invalid_request_error")
    whole = set(body) == {"error"} and set(error) == {"message", "type"} and error["type"] == kind
    return "" if whole and case.word in error["message"] and 0 < len(error["message"]) <= MAX_MESSAGE_CHARS else shown


def fault_in_front(reply: httpx.Response | None) -> str:
    """As `fault` for bytes that are no request: what is in front of the gateway refuses most of them in its own words,
    and repairs some. Or it ends the connection."""
    if reply is None or (400 <= reply.status_code < 500 and KEY not in reply.text):
        return ""
    return f"{reply.status_code} {reply.text[:300]}"


def test_the_table_is_large_and_every_case_has_a_name() -> None:
    names = [case.name for case in (*TABLE, *RAW)]
    assert len(set(names)) == len(names) >= 200


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name[:60])
def test_refused(server, case):
    assert not fault(case, put(server.client, case))
    answer_good(server.client)


@pytest.mark.parametrize("case", UNUSUAL, ids=lambda case: case.name)
def test_answered(server, case):
    reply = put(server.client, case)
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("case", RAW, ids=lambda case: case.name)
def test_refused_bytes(server, case):
    assert not fault(case, put_bytes(server.base_url, case))
    answer_good(server.client)


def test_what_was_refused_has_not_filled_the_memory(server):
    """By the tests before: the peak, so that what was taken for a moment counts too."""
    growth_bytes = peak_bytes(server.process) - server.idle_bytes
    print(f"the server grew by {growth_bytes} bytes at most")
    assert growth_bytes < MAX_GROWTH_BYTES


def peak_bytes(process: psutil.Process) -> int:
    [line] = [line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "VmHWM" in line]
    return 1024 * int(line.split()[1])


def test_a_body_that_never_ends_is_given_up_and_its_place_is_free_again():
    config = ServeConfig(timeout_s=1.0, max_requests=1)
    with http_server(config, {"alice": KEY}) as (base_url, _), connected(base_url) as client:
        answer_good(client)
        with dialled(base_url) as slow:
            started_s = time.monotonic()
            slow.sendall(ENDLESS.sent)
            while time.monotonic() - started_s < 0.5:
                slow.sendall(b" ")
                time.sleep(0.05)
            other = client.post(SIF, json=good_sif(), headers=BEARER)
            assert (other.status_code, other.headers["retry-after"]) == (503, "1")
            assert not fault(ENDLESS, read_reply(slow))
            assert 0.9 < time.monotonic() - started_s < 10
        answer_good(client)


def test_no_address_is_fetched(server):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"
        for case in (sif("", 400, "not fetched", image=address), url("", 400, "not fetched", address)):
            assert not fault(case, put(server.client, case))
        listener.settimeout(0.5)
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_application_refuses_the_same(ray_local, tmp_path):
    (tmp_path / "keys").write_text(f"alice: {KEY}")
    config = ServeConfig(
        policy="toy",
        depth_model="toy",
        port=0,
        max_tokens=8,
        timeout_s=20.0,
        api_keys_file=str(tmp_path / "keys"),
        engine=EngineConfig(max_model_len=512, max_num_seqs=8, kv_cache_gib=0.25),
    )
    faults = []
    with serving(config) as base_url, connected(base_url) as client:
        answer_good(client)
        front = [*processes_named("ray::ServeReplica:sif:Gateway"), *processes_named("ray::ProxyActor")]
        idle_bytes = [peak_bytes(process) for process in front]
        for number, case in enumerate((*TABLE, *FOR_ENGINE, *RAW)):
            if isinstance(case, Bad):
                found = fault(case, put(client, case))
            else:
                found = fault_in_front(put_bytes(base_url, case))
            faults += [f"{case.name}: {found}"] if found else []
            if number % 20 == 0:
                answer_good(client)
        faults += [found for found in [fault(ENDLESS, put_bytes(base_url, ENDLESS))] if found]
        answer_good(client)
        growth = [peak_bytes(process) - idle for process, idle in zip(front, idle_bytes, strict=True)]
    assert not faults, "\n".join(faults)
    print(f"{len(TABLE) + len(RAW)} refused; gateway and proxy grew by {growth} bytes at most")
    assert len(growth) == 2 and max(growth) < MAX_GROWTH_BYTES
