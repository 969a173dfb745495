"""The actor that looks at the network from one node of a cluster. Plain Python; made an actor where it is started."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from sif_ray.doctor.endpoints import unreachable

TRIPS = 5
CONNECT_S = 3.0


class Probe:
    """Answers on one node and asks others."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None

    def now_s(self) -> float:
        """This node's clock."""
        return time.time()

    def listen(self) -> int:
        """A free port on which connections are taken, as between the ranks of a process group."""
        if self._listener is None:
            self._listener = socket.create_server(("", 0))
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()
        port: int = self._listener.getsockname()[1]
        return port

    def _accept(self, listener: socket.socket) -> None:
        while True:
            listener.accept()[0].close()

    def reach(self, host: str, ports: Mapping[str, int]) -> dict[str, str]:
        """Why ports of another node cannot be reached, by what listens there; nothing of those that can."""
        found = {what: unreachable(host, port, CONNECT_S) for what, port in ports.items()}
        return {what: why for what, why in found.items() if why}

    def payload(self, num_bytes: int) -> bytes:
        """What is sent to measure with: random, so that nothing on the way makes it smaller."""
        return os.urandom(num_bytes)

    def fetch_s(self, references: list[Any]) -> float:
        """Seconds in which an object of another node comes here."""
        import ray

        started_s = time.perf_counter()
        ray.get(references[0])
        return time.perf_counter() - started_s

    def round_trip_s(self, other: Any) -> float:
        """The shortest of some calls to another node's probe."""
        import ray

        times = []
        for _ in range(TRIPS):
            started_s = time.perf_counter()
            ray.get(other.now_s.remote())
            times.append(time.perf_counter() - started_s)
        return min(times)
