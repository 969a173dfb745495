"""A small GRPO run of the real stage in a process of its own, to be struck and watched."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

from sif_ray import config as configuration
from sif_ray.chaos.process_tree import LOG, ProcessTree
from sif_ray.chaos.promise import Violation, promise
from sif_ray.config import GrpoConfig
from sif_ray.observe import jsonl
from sif_ray.observe.metrics import read_metrics
from sif_ray.observe.trail import read_trail

DRIVER = "from sif_ray.cli import run_job; raise SystemExit(run_job('grpo'))"
ROLLOUT_ACTOR, REWARD_WORKER, LEARNER = "ray::RolloutActor", "ray::RewardActor", "ray::LearnerActor"
# Mean |delta log-prob|, engine against learner: 3e-7 in float32. Weights of one version before make 3e-5 of it.
MAX_PARITY = 5e-6
STEP_TIMEOUT_S = 300.0  # for the next step to be done, a start included


class JudgeServer:
    """An OpenAI-compatible judge on loopback that can be killed and comes back at the same address."""

    def __init__(self) -> None:
        self._port = 0
        self._process: psutil.Popen | None = None

    @property
    def process(self) -> psutil.Process:
        assert self._process is not None
        return self._process

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def start(self) -> None:
        command = [sys.executable, "-m", "sif_ray.bench.chat_server", "--latency-s", "0.2", "--port", str(self._port)]
        self._process = psutil.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._port = int(self._process.stdout.readline())

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


class Victim(ProcessTree):
    """The stage `grpo` under `config`, in a folder of its own."""

    def __init__(self, config: GrpoConfig, folder: Path) -> None:
        self.config = config
        self.judge: JudgeServer | None = None
        self._file = folder / "grpo.yaml"
        self._counted = 0, 0  # bytes of the metrics, steps in them
        super().__init__([sys.executable, "-c", DRIVER, "--config", str(self._file)], folder / LOG)

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def policy(self) -> Path:
        """The weights that it ends with."""
        return self.output / "checkpoint" / "model.safetensors"

    def start(self) -> None:
        self._file.write_text(configuration.to_yaml(self.config))
        super().start()

    def steps(self) -> int:
        """Training steps that it has told of, in all its lives."""
        with contextlib.suppress(FileNotFoundError):
            metrics = self.output / "metrics.jsonl"
            size = metrics.stat().st_size
            if size != self._counted[0]:
                self._counted = size, len(metrics.read_bytes().splitlines())
            return self._counted[1]
        return 0

    def wait_for_steps(self, count: int) -> None:
        """Until it has told of so many. Raises `Violation` when it ends or stalls before."""
        deadline_s = time.monotonic() + STEP_TIMEOUT_S
        while self.steps() < count:
            self.alive()  # so that those are known whose parent dies
            self.check_runs()
            if time.monotonic() > deadline_s:
                raise Violation(f"{self.steps()} steps after {STEP_TIMEOUT_S:g} s:\n{self.log_tail()}")
            time.sleep(0.05)

    def newest_checkpoint(self) -> Path:
        """The one that a run goes on from."""
        return max((self.output / "checkpoints").glob("step-*"))

    def starts(self) -> list[int]:
        """The version from which each of its lives has trained, those that a learner's death has ended included."""
        lines = jsonl.read(self.output / "trained.jsonl")
        return [line["continue_from"] for line in lines if "continue_from" in line]

    def told_since(self, size: int) -> str:
        """What it has written since its log had this size."""
        return self.log.read_bytes()[size:].decode(errors="replace")

    def check_finished(self) -> None:
        """What a finished run promises; see docs/reliability.md."""
        finished = json.loads((self.output / "finished.json").read_text())
        steps = self.check_trail()
        promise(len(steps) == finished["version"], f"the trail is of {len(steps)} steps of {finished['version']}")
        trained = {ticket_id for tickets in steps.values() for ticket_id in tickets}
        planned = self.config.max_steps * self.config.groups_per_step
        ended = len(trained) + len(finished["dropped"])
        promise(ended == planned, f"{ended} tickets ended of {planned}")
        promise(not finished["dropped"], f"one fault cost prompts: {finished['dropped']}")
        promise(self.policy.is_file(), "there is no policy")
        self.check_metrics()

    def check_metrics(self) -> None:
        """No prompt was dropped, and engines wrote with the weights that they said."""
        metrics = read_metrics(self.output / "metrics.jsonl")
        promise(metrics[-1]["tickets/dropped"] == 0, f"{metrics[-1]['tickets/dropped']:g} prompts were dropped")
        parities = {step["step"]: step["parity_mean_abs"] for step in metrics if "parity_mean_abs" in step}
        promise(bool(parities), "no parity was probed")
        promise(max(parities.values()) < MAX_PARITY, f"engines have other weights than the learner: {parities}")

    def check_trail(self) -> dict[int, dict[str, int]]:
        """What was trained so far: every version once, every ticket at most once, no token older than the window."""
        steps = read_trail(self.output / "trained.jsonl")
        promise(bool(steps), "nothing was trained")
        promise(list(steps) == list(range(1, len(steps) + 1)), f"the trail is of versions {list(steps)}")
        trained = Counter(ticket_id for tickets in steps.values() for ticket_id in tickets)
        twice = [name for name, count in trained.items() if count > 1]
        promise(not twice, f"trained twice: {twice}")
        ages = [version - 1 - oldest for version, tickets in steps.items() for oldest in tickets.values()]
        promise(min(ages) >= 0 and max(ages) <= self.config.max_staleness, f"staleness of {min(ages)} to {max(ages)}")
        return steps
