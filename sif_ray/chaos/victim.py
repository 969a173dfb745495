"""A small GRPO run of the real stage in a process of its own, to be struck and watched."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from sif_ray import config as configuration
from sif_ray.chaos.promise import promise
from sif_ray.config import GrpoConfig
from sif_ray.observe.trail import read_trail

DRIVER = "from sif_ray.cli import run_job; raise SystemExit(run_job('grpo'))"
STEP_TIMEOUT_S = 300.0  # for the next step to be done, a start included
END_TIMEOUT_S = 400.0
GONE_TIMEOUT_S = 90.0  # for the processes of a run that has ended to follow it; agents of Ray look about once in 40 s


class JudgeServer:
    """An OpenAI-compatible judge on loopback that can be killed and comes back at the same address."""

    def __init__(self) -> None:
        self._port = 0
        self._process: subprocess.Popen[str] | None = None

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def start(self) -> None:
        command = [sys.executable, "-m", "sif_ray.bench.chat_server", "--latency-s", "0.2", "--port", str(self._port)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._port = int(self._process.stdout.readline())

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@dataclass
class Victim:
    """The stage `grpo` under `config`, started as often as it takes."""

    config: GrpoConfig
    folder: Path
    judge: JudgeServer | None = None
    process: subprocess.Popen[bytes] | None = None
    seen: list[psutil.Process] = field(default_factory=list)  # whatever belonged to it

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def start(self) -> None:
        """Start it, or start it again."""
        file = self.folder / "grpo.yaml"
        file.write_text(configuration.to_yaml(self.config))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", DRIVER, "--config", str(file)],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def steps(self) -> int:
        """Training steps that it has told of, in all its lives."""
        with contextlib.suppress(FileNotFoundError):
            return len((self.output / "metrics.jsonl").read_bytes().splitlines())
        return 0

    def wait_for_steps(self, count: int) -> None:
        """Until it has told of so many. Raises `Violation` when it ends or stalls before."""
        assert self.process is not None
        deadline_s = time.monotonic() + STEP_TIMEOUT_S
        while self.steps() < count:
            self._look()
            promise(self.process.poll() is None, f"it ended by {self.process.poll()}:\n{self.log_tail()}")
            promise(
                time.monotonic() < deadline_s, f"{self.steps()} steps after {STEP_TIMEOUT_S:g} s:\n{self.log_tail()}"
            )
            time.sleep(0.05)

    def wait(self) -> int:
        """Its exit status. Raises `Violation` when it does not end, or leaves processes behind."""
        assert self.process is not None
        deadline_s = time.monotonic() + END_TIMEOUT_S
        while self.process.poll() is None:
            self._look()
            promise(time.monotonic() < deadline_s, f"it has not ended:\n{self.log_tail()}")
            time.sleep(0.2)
        _, alive = psutil.wait_procs(self.seen, timeout=GONE_TIMEOUT_S)
        left = [_told(process) for process in alive]
        promise(not left, f"left behind: {left}")
        self.seen.clear()
        return int(self.process.returncode)

    def processes(self, title: str) -> list[psutil.Process]:
        """Those of its processes that have `title` in their command line."""
        self._look()
        return [process for process in self.seen if process.is_running() and title in _told(process)]

    def titles(self) -> list[str]:
        """What its processes call themselves."""
        return [_told(process)[:80] for process in self.seen if process.is_running()]

    def end(self) -> None:
        """Kill what is left of it."""
        self._look()
        for process in self.seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self.seen, timeout=GONE_TIMEOUT_S)

    def log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])

    def check_finished(self) -> None:
        """What a finished run promises; see docs/reliability.md."""
        finished = json.loads((self.output / "finished.json").read_text())
        steps = read_trail(self.output / "trained.jsonl")
        promise(list(steps) == list(range(1, finished["version"] + 1)), f"the trail is of versions {list(steps)}")
        trained = Counter(ticket_id for tickets in steps.values() for ticket_id in tickets)
        promise(
            set(trained.values()) == {1}, f"trained twice: {[name for name, count in trained.items() if count > 1]}"
        )
        planned = self.config.max_steps * self.config.groups_per_step
        ended = len(trained) + len(finished["dropped"])
        promise(ended == planned, f"{ended} tickets ended of {planned}; dropped: {finished['dropped']}")
        ages = [version - 1 - oldest for version, tickets in steps.items() for oldest in tickets.values()]
        promise(min(ages) >= 0 and max(ages) <= self.config.max_staleness, f"staleness of {min(ages)} to {max(ages)}")
        promise((self.output / "checkpoint" / "model.safetensors").is_file(), "there is no policy")

    def _look(self) -> None:
        """Remember what belongs to it; a process whose parent dies belongs to it no less."""
        assert self.process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            known = {process.pid for process in self.seen}
            self.seen += [one for one in (own, *own.children(recursive=True)) if one.pid not in known]


def _told(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline()) or process.name()
    return "?"


@contextlib.contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    """The process stands still inside the body."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)
