"""A Ray cluster of several nodes on this machine, with token authentication, in a process of its own.

As a program it prints the addresses of its Jobs API and its GCS and the folder of its session, then obeys the lines on
its standard input, each answered by one line: `add CPUS` starts a node and answers its id, `remove ID` kills one; the
end of the input ends the cluster.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass
class ClusterProcess:
    """The cluster as its tests see it."""

    process: subprocess.Popen[str]
    token: str
    address: str = ""
    gcs_address: str = ""
    session: str = ""  # folder with its logs
    environment: dict[str, str] = field(default_factory=dict)  # of programs that talk to it

    def tell(self, line: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the cluster has ended"
        return line.strip()

    def run(self, script: str, *arguments: str, token: str = "") -> subprocess.CompletedProcess[str]:
        """A program of the checkout that talks to the cluster; what it prints is all in `stdout`."""
        environment = self.environment | ({"RAY_AUTH_TOKEN": token} if token else {})
        return subprocess.run(
            [sys.executable, script, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def add_node(self, num_cpus: int) -> str:
        return self.tell(f"add {num_cpus}")

    def remove_node(self, node_id: str) -> None:
        assert self.tell(f"remove {node_id}") == "removed"


@contextmanager
def cluster_process(num_cpus: int, environment: Mapping[str, str] | None = None) -> Iterator[ClusterProcess]:
    """A head with so many logical CPUs; `environment` is that of all its processes, beside this one's."""
    token = secrets.token_hex(16)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # a job's `python` is this one
    known = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "PATH": path, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, __file__, str(num_cpus)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=known | dict(environment or {}),
    )
    cluster = ClusterProcess(process, token, environment=known)
    try:
        cluster.address, cluster.gcs_address, cluster.session = cluster.answer().split()
        yield cluster
    finally:
        process.communicate()


def main(num_cpus: int) -> None:
    from ray.cluster_utils import Cluster

    commands = sys.stdin
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever Ray prints does not come between the answers
    free = {"dashboard_agent_listen_port": 0}  # its default is one port for all clusters of a machine
    head = {"num_cpus": num_cpus, "include_dashboard": True, "dashboard_port": 0, **free}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = {}
    answers.write(f"http://{cluster.webui_url} {cluster.address} {cluster.head_node.get_session_dir_path()}\n")
    for line in commands:
        verb, argument = line.split()
        if verb == "add":
            node = cluster.add_node(num_cpus=int(argument), **free)
            nodes[node.node_id] = node
            answers.write(f"{node.node_id}\n")
        else:
            cluster.remove_node(nodes.pop(argument), allow_graceful=False)
            answers.write("removed\n")
    cluster.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]))
