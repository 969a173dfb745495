"""A process with everything that it starts, watched and struck from outside."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from sif_ray.chaos.promise import promise

END_TIMEOUT_S = 400.0
GONE_TIMEOUT_S = 90.0  # for the processes of a run that has ended to follow it; agents of Ray look about once in 40 s
FIND_TIMEOUT_S = 10.0  # for a process that is to be struck
ENGINE = "VLLM::EngineCore"
_NAMELESS = "multiprocessing.spawn import spawn_main"


class ProcessTree:
    """`command`, started as often as it takes; what it writes is added to the file `log`."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.command, self.log = list(command), log
        self.process: subprocess.Popen[bytes] | None = None
        self._seen: list[psutil.Process] = []  # whatever belonged to it

    def start(self) -> None:
        """Start it, or start it again."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, start_new_session=True)

    def wait(self) -> int:
        """Its exit status. Raises `Violation` when it does not end."""
        assert self.process is not None
        deadline_s = time.monotonic() + END_TIMEOUT_S
        while self.process.poll() is None:
            self.look()
            promise(time.monotonic() < deadline_s, f"it has not ended:\n{self.log_tail()}")
            time.sleep(0.2)
        return int(self.process.returncode)

    def check_gone(self) -> None:
        """Raises `Violation` when a process of any of its lives outlives the last one."""
        _, alive = psutil.wait_procs(self._seen, timeout=GONE_TIMEOUT_S)
        left = [_told(process) for process in alive]
        promise(not left, f"left behind: {left}")

    def check_runs(self) -> None:
        """Raises `Violation` when it has ended."""
        assert self.process is not None
        promise(self.process.poll() is None, f"it ended by {self.process.poll()}:\n{self.log_tail()}")

    def alive(self) -> list[psutil.Process]:
        """All its processes."""
        self.look()
        return [process for process in self._seen if process.is_running()]

    def processes(self, title: str) -> list[psutil.Process]:
        """Those that have `title` in their command line."""
        return [process for process in self.alive() if title in _told(process)]

    def one(self, title: str) -> psutil.Process:
        """The only one of this title, as soon as it is there. Raises `Violation` when it does not come."""
        deadline_s = time.monotonic() + FIND_TIMEOUT_S
        while len(found := self.processes(title)) != 1:
            titles = [_told(process)[:80] for process in self.alive()]
            promise(time.monotonic() < deadline_s, f"{len(found)} processes of {title} among {titles}")
            time.sleep(0.1)
        return found[0]

    def end(self) -> None:
        """Kill what is left of it."""
        if self.process is None:
            return
        self.look()
        for process in self._seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self._seen, timeout=GONE_TIMEOUT_S)
        self.process.wait()

    def log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])

    def look(self) -> None:
        """Remember what belongs to it; a process whose parent dies belongs to it no less."""
        assert self.process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            known = {process.pid for process in self._seen if process.is_running()}
            self._seen += [one for one in (own, *own.children(recursive=True)) if one.pid not in known]


def _told(process: psutil.Process) -> str:
    """What a process calls itself. An engine keeps the command that spawned it where setproctitle finds no room: it
    looks for it beside the first variable of the environment, which Ray puts in random order and vLLM changes."""
    with contextlib.suppress(psutil.Error):
        title = " ".join(process.cmdline()) or process.name()
        return f"{ENGINE} {title}" if _NAMELESS in title else title
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
