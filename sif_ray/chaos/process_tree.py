"""A process with everything that it starts, watched and struck from outside."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from sif_ray.chaos.promise import Violation, promise

END_TIMEOUT_S = 400.0
GONE_TIMEOUT_S = 90.0  # for the processes of a run that has ended to follow it; agents of Ray look about once in 40 s
FIND_TIMEOUT_S = 10.0  # for a process that is to be struck
TAIL_BYTES = 65536
ENGINE, RAYLET, GCS = "VLLM::EngineCore", "raylet/raylet", "gcs/gcs_server"
LOG = "log.txt"
_NAMELESS = "multiprocessing.spawn import spawn_main"


class ProcessTree:
    """`command`, started as often as it takes; what it writes is added to the file `log`. Threads may share it."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.command, self.log = list(command), log
        self.process: subprocess.Popen[bytes] | None = None
        self._seen: set[psutil.Process] = set()  # whatever belongs to it and has not gone
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start it, or start it again."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, start_new_session=True)
        with self._lock:
            self._seen.add(psutil.Process(self.process.pid))

    def wait(self) -> int:
        """Its exit status. Raises `Violation` when it does not end."""
        assert self.process is not None
        deadline_s = time.monotonic() + END_TIMEOUT_S
        while self.process.poll() is None:
            self.alive()
            if time.monotonic() > deadline_s:
                raise Violation(f"it has not ended:\n{self.log_tail()}")
            time.sleep(0.2)
        return int(self.process.returncode)

    def stop(self) -> None:
        """Tell it to end. Raises `Violation` when that is no clean stop."""
        assert self.process is not None
        self.process.terminate()
        status = self.wait()
        promise(status == 130, f"SIGTERM ended it with status {status}, 130 is a clean stop:\n{self.log_tail()}")

    def check_runs(self) -> None:
        """Raises `Violation` when it has ended."""
        assert self.process is not None
        if self.process.poll() is not None:
            raise Violation(f"it ended by {self.process.poll()}:\n{self.log_tail()}")

    def check_gone(self) -> None:
        """Raises `Violation` when a process of any of its lives outlives the last one."""
        _, alive = psutil.wait_procs(self.alive(), timeout=GONE_TIMEOUT_S)
        promise(not alive, f"left behind: {[_told(process) for process in alive]}")

    def watch_for(self, seconds: float) -> None:
        """Let time pass; what loses its parent meanwhile is known."""
        ends_s = time.monotonic() + seconds
        while time.monotonic() < ends_s:
            self.alive()
            time.sleep(0.2)

    def alive(self) -> list[psutil.Process]:
        """All its processes; one whose parent has died belongs to it no less."""
        with self._lock:
            self._seen = {one for one in self._seen if one.is_running()}
            pids = {one.pid for one in self._seen}
            others = list(psutil.process_iter(["ppid"]))
            while found := [one for one in others if one.pid not in pids and one.info["ppid"] in pids]:
                self._seen.update(found)
                pids.update(one.pid for one in found)
            return sorted(self._seen, key=lambda one: one.pid)

    def processes(self, title: str) -> list[psutil.Process]:
        """Those that have `title` in their command line."""
        return [process for process in self.alive() if title in _told(process)]

    def one(self, title: str) -> psutil.Process:
        """The only one of this title, as soon as it is there. Raises `Violation` when it does not come."""
        deadline_s = time.monotonic() + FIND_TIMEOUT_S
        while len(found := self.processes(title)) != 1:
            if time.monotonic() > deadline_s:
                titles = [_told(process)[:80] for process in self.alive()]
                raise Violation(f"{len(found)} processes of {title} among {titles}")
            time.sleep(0.1)
        return found[0]

    def end(self) -> None:
        """Kill what is left of it, and what that starts meanwhile."""
        deadline_s = time.monotonic() + GONE_TIMEOUT_S
        while left := self.alive():
            promise(time.monotonic() < deadline_s, f"cannot be killed: {left}")
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            if self.process is not None:
                self.process.poll()  # else it stays, as a zombie
            psutil.wait_procs(left, timeout=1.0)

    def log_tail(self) -> str:
        """Its last lines."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - TAIL_BYTES))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-30:])


def _told(process: psutil.Process) -> str:
    """What a process calls itself. An engine keeps the command that spawned it where setproctitle finds no room: it
    looks for it beside the first variable of the environment, which Ray puts in random order and vLLM changes."""
    with contextlib.suppress(psutil.Error):
        title = " ".join(process.cmdline()) or process.name()
        return f"{ENGINE} {title}" if _NAMELESS in title else title
    return "?"


@contextlib.contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    """The process stands still inside the body, if it is there."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.suspend()
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()
