"""OpenAI-compatible APIs of judges, teachers and policies: reached step by step, so that the fault has a name.

proxy ─► name ─► connection ─► TLS ─► key ─► list of models. Nothing here costs tokens, and nothing waits for long.
"""

from __future__ import annotations

import ipaddress
import socket
import urllib.request
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

import httpx

from sif_ray.doctor.finding import Finding, fault, note, ok
from sif_ray.doctor.need import Endpoint

TIMEOUT_S = 5.0  # of every attempt to reach something
MODELS, CHAT = "/models", "/chat/completions"
_INTERNAL = (".local", ".internal", ".svc", ".lan")  # ends of names that no proxy outside knows
_SHOWN_MODELS = 5


def endpoint_findings(
    endpoint: Endpoint, environ: Mapping[str, str], timeout_s: float = TIMEOUT_S
) -> Iterator[Finding]:
    """Whether `endpoint` answers, with the key in `environ`, and knows its model."""
    check, url = f"{endpoint.field}: endpoint", endpoint.base_url.rstrip("/")
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    proxy = proxy_for(parts.scheme, host, environ)
    if proxy and is_internal(host):
        yield fault(
            check,
            f"{parts.scheme.upper()}_PROXY is set, so that calls to {host}, a host of this network, go to the proxy",
            f"add {host} to NO_PROXY on every node",
        )
        return
    if not proxy and (why := unreachable(host, port, timeout_s)):
        fix = (
            f"start it, or correct {endpoint.field}.base_url; firewalls and network policies must let port {port} pass"
        )
        yield fault(check, f"{url}: {why}", fix)
        return
    key = environ.get(endpoint.api_key_env, "").strip() if endpoint.api_key_env else ""
    headers = {"Authorization": f"Bearer {key}"} if key and key.isascii() and key.isprintable() else {}
    try:
        with httpx.Client(timeout=timeout_s, headers=headers) as client:
            yield _judged(check, endpoint, url, client)
    except httpx.TimeoutException:
        yield fault(check, f"{url}: connected, and no reply within {timeout_s:g} s", "see whether the server hangs")
    except httpx.HTTPError as error:
        yield fault(check, f"{url}: {type(error).__name__}: {error}", _fix_of(error, endpoint))


def _judged(check: str, endpoint: Endpoint, url: str, client: httpx.Client) -> Finding:
    reply = client.get(f"{url}{MODELS}")
    status = reply.status_code
    if status in (404, 405):  # some servers have no list; a request without content tells whether they have the rest
        return _without_list(check, endpoint, url, client)
    if (wrong := _refused(check, endpoint, url, status)) is not None:
        return wrong
    try:
        names = [str(model["id"]) for model in reply.json()["data"]]
    except (ValueError, KeyError, TypeError):
        return fault(
            check,
            f"{url}{MODELS} answers HTTP {status} with something that is no list of models",
            f"{endpoint.field}.base_url is the address of another program; it ends with /v1 as a rule",
        )
    if endpoint.model not in names:
        return fault(
            check,
            f"{url} answers, and has no model {endpoint.model!r}; it has {', '.join(names[:_SHOWN_MODELS]) or 'none'}",
            f"set {endpoint.field}.model to one of them, or start the server with --served-model-name {endpoint.model}",
        )
    return ok(check, f"{url} answers and has {endpoint.model!r}")


def _without_list(check: str, endpoint: Endpoint, url: str, client: httpx.Client) -> Finding:
    status = client.post(f"{url}{CHAT}", json={}).status_code
    if status in (404, 405):
        found = client.get(f"{url}/v1{MODELS}").status_code not in (404, 405)
        wanted = f"{url}/v1" if found else "the address that ends before /chat/completions, as a rule with /v1"
        return fault(
            check,
            f"{url} answers, and has neither {MODELS} nor {CHAT} (HTTP {status})",
            f"set {endpoint.field}.base_url to {wanted}",
        )
    if (wrong := _refused(check, endpoint, url, status)) is not None:
        return wrong
    return note(
        check,
        f"{url} answers, but lists no models: whether it has {endpoint.model!r} is not known",
        "the run asks it a question before it starts",
    )


def _refused(check: str, endpoint: Endpoint, url: str, status: int) -> Finding | None:
    """What a status says against the endpoint, None where it says nothing."""
    if status in (401, 403):
        which = f"the key in {endpoint.api_key_env}" if endpoint.api_key_env else "a request without a key"
        fix = (
            f"put the right key into {endpoint.api_key_env}"
            if endpoint.api_key_env
            else f"name the variable that holds the key: {endpoint.field}.api_key_env"
        )
        return fault(check, f"{url} refuses {which} (HTTP {status})", fix)
    if status == 429:
        return note(check, f"{url} answers HTTP 429: its rate is used up now", "look at its quota before the run")
    if status >= 500:
        return fault(check, f"{url} answers HTTP {status}", "see its log: it may still load its model")
    return None


def _fix_of(error: httpx.HTTPError, endpoint: Endpoint) -> str:
    text = str(error).lower()
    if "certificate" in text:
        return "name the authority's certificate in SSL_CERT_FILE, or correct the host name"
    if "ssl" in text or "tls" in text:
        return f"write http:// in {endpoint.field}.base_url if the server speaks no TLS"
    return f"start it, or correct {endpoint.field}.base_url (http or https, host, port) or the proxy"


def unreachable(host: str, port: int, timeout_s: float = TIMEOUT_S) -> str:
    """Why no connection to a port can be made, "" where one can."""
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return f"the name {host} is not known ({error})"
    try:
        socket.create_connection((host, port), timeout_s).close()
    except TimeoutError:
        return f"no connection to port {port} of {host} within {timeout_s:g} s"
    except OSError as error:
        return f"no connection to port {port} of {host} ({error.strerror or error})"
    return ""


def proxy_for(scheme: str, host: str, environ: Mapping[str, str]) -> str:
    """The proxy that clients take to `host`, "" for none."""

    def first(*names: str) -> str:
        return next((value for name in names if (value := environ.get(name) or environ.get(name.upper()))), "")

    proxy = first(f"{scheme}_proxy", "all_proxy")
    no_proxy = first("no_proxy")
    return "" if proxy and urllib.request.proxy_bypass_environment(host, {"no": no_proxy}) else proxy


def is_internal(host: str) -> bool:
    """Whether only this network can know the host: a private address, a bare name, a name of a cluster."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith(_INTERNAL)
    return address.is_private or address.is_loopback
