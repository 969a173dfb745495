"""Free TCP ports of this machine."""

from __future__ import annotations

import contextlib
import socket


def free_ports(number: int, host: str = "127.0.0.1") -> list[int]:
    """Different ports at `host` ("" = every address) on which nobody listens now."""
    with contextlib.ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(number)]
        for probe in sockets:
            probe.bind((host, 0))
        return [probe.getsockname()[1] for probe in sockets]


def free_port(host: str = "127.0.0.1") -> int:
    [port] = free_ports(1, host)
    return port
