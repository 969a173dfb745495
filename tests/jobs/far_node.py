"""A Ray node with a network of its own, joined to the other nodes by a cable that can be cut."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from cluster_process import ClusterProcess

NEAR, FAR = "198.18.213.1", "198.18.213.2"  # of a range that is for tests, RFC 2544


class Cable:
    """Between this machine's network and the one of `name`, which is made. Only root may, on Linux."""

    def __init__(self, name: str) -> None:
        self.name = name
        _ip("netns", "add", name)
        _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("addr", "add", f"{NEAR}/30", "dev", name)
        _ip("-n", name, "addr", "add", f"{FAR}/30", "dev", "eth0")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "link", "set", "eth0", "up")
        self.mend()
        _ip("-n", name, "route", "add", "default", "via", NEAR)

    def cut(self) -> None:
        """Nothing arrives any more, and nobody is told."""
        _ip("link", "set", self.name, "down")

    def mend(self) -> None:
        _ip("link", "set", self.name, "up")

    def remove(self) -> None:
        _ip("netns", "delete", self.name)


@contextmanager
def far_node(cluster: ClusterProcess, num_cpus: int) -> Iterator[Cable]:
    """A node at the other end of a cable, until the end of the body."""
    cable = Cable(f"sif{os.getpid()}")
    try:
        options = ["--address", cluster.gcs_address, "--node-ip-address", FAR, "--num-cpus", str(num_cpus), "--block"]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--dashboard-agent-listen-port", "0"]
        with subprocess.Popen(["ip", "netns", "exec", cable.name, *ray, *options], env=cluster.environment) as node:
            try:
                yield cable
            finally:
                node.terminate()
    finally:
        cable.remove()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
