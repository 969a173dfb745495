"""`serve deploy` on a cluster of its own: the shipped configuration, and another checkpoint rolled out under load."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema

from sif_ray.bench.serve import write_babbling_policy
from sif_ray.config import ConfigError
from sif_ray.ports import free_port
from sif_ray.serve.app import build_app
from sif_ray.toyworld.render import png, render
from sif_ray.toyworld.scenes import make_scene

SHIPPED = Path(__file__).parents[2] / "cluster" / "serve.yaml"
READY_WITHIN_S = 180.0
OPEN = os.environ | {"RAY_AUTH_MODE": "disabled"}  # whatever token this machine's user has for Ray
SERVE = str(Path(sys.executable).with_name("serve"))
CLUSTER = """
import sys
from ray._private.worker import get_dashboard_url
from sif_ray.config import RayConfig
from sif_ray.runtime import ray_session
with ray_session(RayConfig(num_cpus=8)):
    print(get_dashboard_url(), flush=True)
    sys.stdin.read()
"""


def test_the_shipped_configuration_is_one_of_ray_serve_and_of_the_application():
    config = yaml.safe_load(SHIPPED.read_text())
    [application] = ServeDeploySchema.model_validate(config).applications
    assert application.import_path == f"{build_app.__module__}:{build_app.__name__}"
    assert isinstance(build_app(application.args | {"policy": "toy"}), serve.Application)


def test_what_cannot_be_served_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(ConfigError, match="policy = "):
        build_app({"policy": str(tmp_path / "nothing")})
    with pytest.raises(ConfigError, match=r"adapters\.cars = .*has no adapter_config\.json"):
        build_app({"policy": "toy", "adapters": {"cars": str(tmp_path)}})


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({"polici": "x"}, "polici"),
        ({"port": "x"}, "port"),
        ({"actors_max": 0}, "actors_max"),
        ({"engine": 3}, "EngineConfig"),
    ],
)
def test_wrong_arguments_are_named(args, told):
    with pytest.raises(ConfigError, match=told):
        build_app(args)


@contextmanager
def cluster() -> Iterator[str]:
    """Address of the dashboard of a Ray that ends with the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=OPEN
    )
    try:
        assert process.stdout is not None
        yield f"http://{process.stdout.readline().strip()}"
    finally:
        process.communicate("")


def deploy(dashboard: str, file: Path, port: int, **args: Any) -> None:
    config = yaml.safe_load(SHIPPED.read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    config["applications"][0]["args"] |= args
    file.write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [SERVE, "deploy", str(file), "--address", dashboard],
        capture_output=True,
        text=True,
        timeout=60,
        env=OPEN,
    )
    assert done.returncode == 0, done.stderr


def until_running(dashboard: str) -> None:
    ends_s = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < ends_s:
        reply = httpx.get(f"{dashboard}/api/serve/applications/", timeout=30)
        found = reply.json()["applications"].get("sif", {})
        assert found.get("status") != "DEPLOY_FAILED", found["message"]
        if found.get("status") == "RUNNING":
            return
        time.sleep(1)
    pytest.fail(f"not running after {READY_WITHIN_S:g} s: {json.dumps(found)[:2000]}")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_another_checkpoint_is_rolled_out_without_a_failed_request(tmp_path):
    port = free_port()
    url = "data:image/png;base64," + base64.b64encode(png(render(make_scene(3)).rgb)).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "How many balls?"}]
    asked = {"model": "sif", "messages": [{"role": "user", "content": content}], "max_tokens": 8}
    replies: list[tuple[int, str]] = []
    ended = threading.Event()

    def ask() -> str:
        reply = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=asked, timeout=120)
        replies.append((reply.status_code, reply.text if reply.is_error else _written(reply.json())))
        return replies[-1][1]

    def keep_asking() -> None:
        while not ended.is_set():
            ask()

    with cluster() as dashboard:
        deploy(dashboard, tmp_path / "first.yaml", port, policy="toy")
        until_running(dashboard)
        first = ask()
        askers = [threading.Thread(target=keep_asking) for _ in range(3)]
        for asker in askers:
            asker.start()
        try:
            second_policy = write_babbling_policy(tmp_path / "policy")
            deploy(dashboard, tmp_path / "second.yaml", port, policy=second_policy)
            time.sleep(2)  # until the controller has begun
            until_running(dashboard)
        finally:
            ended.set()
            for asker in askers:
                asker.join()
        second = ask()
    assert first != second
    assert {status for status, _ in replies} == {200}, [reply for reply in replies if reply[0] != 200][:3]
    assert {text for _, text in replies} == {first, second}
    print(f"{len(replies)} requests, {[text for _, text in replies].count(second)} of them by the new policy")


def _written(reply: dict[str, Any]) -> str:
    message = reply["choices"][0]["message"]
    return f"{message.get('reasoning_content')}{message['content']}"
