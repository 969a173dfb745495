"""vLLM's own OpenAI-compatible server as a child of this process: a model of one's own behind the same client as a
hosted one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from sif_ray.config import EngineConfig
from sif_ray.policy.model import resolve_model
from sif_ray.ports import free_port
from sif_ray.rollout.environment import engine_environment, executor
from sif_ray.rollout.orphans import end_group_with_owner

START_TIMEOUT_S = 1800.0  # a large model takes minutes to load
END_TIMEOUT_S = 20.0
POLL_S = 0.5
MAX_IMAGES = 5  # of a prompt: the most forward frames of a sample
_SERVER = "vllm.entrypoints.openai.api_server"


class VllmServer:
    """One server on a free port of the loopback interface. All its processes end with this one, however it dies.

    Example: `VllmServer("Qwen/Qwen2.5-VL-7B-Instruct", EngineConfig(num_gpus=1), Path("vllm.log")).base_url`.
    """

    def __init__(self, model: str, config: EngineConfig, log: Path) -> None:
        """Start the server and wait until it is healthy. `log` takes what it prints.

        Raises `RuntimeError`, with the end of the log, when it does not start.
        """
        port, self._log = free_port(), log
        self.base_url = f"http://127.0.0.1:{port}/v1"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, *_arguments(model, config, port)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | engine_environment(config),
                start_new_session=True,  # a process group of its own, which is ended as one
            )
        try:
            self._wait_until_healthy(f"http://127.0.0.1:{port}/health")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the server and its workers."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):  # nobody is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    async def end(self) -> str:
        """Wait until the server has ended, and say how."""
        while self._process.poll() is None:
            await asyncio.sleep(POLL_S)
        return f"vLLM ended with status {self._process.poll()}; see {self._log}"

    def _wait_until_healthy(self, url: str) -> None:
        end_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end_s and self._process.poll() is None:
            try:
                with urllib.request.urlopen(url, timeout=5):
                    return
            except OSError:
                time.sleep(POLL_S)
        said = self._log.read_text(errors="replace")[-3000:]
        raise RuntimeError(
            f"vLLM did not start (exit status {self._process.poll()}); see {self._log}, which ends:\n{said}"
        )


def _arguments(model: str, config: EngineConfig, port: int) -> list[str]:
    options = {
        "--model": resolve_model(model),
        "--served-model-name": model,
        "--host": "127.0.0.1",
        "--port": str(port),
        "--max-model-len": str(config.max_model_len),
        "--max-num-seqs": str(config.max_num_seqs),
        "--tensor-parallel-size": str(config.tensor_parallel_size),
        "--gpu-memory-utilization": str(config.gpu_memory_utilization),
        "--limit-mm-per-prompt": json.dumps({"image": MAX_IMAGES, "video": 0}),
    }
    flags = ["--disable-uvicorn-access-log"]
    if config.enforce_eager:
        flags.append("--enforce-eager")
    if not config.num_gpus:
        if backend := executor(config, on_cpu=True):
            options["--distributed-executor-backend"] = backend
        options["--kv-cache-memory-bytes"] = str(int(config.kv_cache_gib * 2**30))
        # Whole prompts only: after a part of one, a seeded request on a CPU ends the engine.
        options["--max-num-batched-tokens"] = str(max(8192, config.max_model_len))
        flags += ["--no-enable-chunked-prefill", "--skip-mm-profiling"]
    return [*(part for option in options.items() for part in option), *flags]


if __name__ == "__main__":
    end_group_with_owner()
    runpy.run_module(_SERVER, run_name="__main__", alter_sys=True)
