"""A key at work on a real cluster is found nowhere but in the environment that it was put into."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from conftest import KEY, KEY_NAME, finished
from judge_servers import SmallJudge

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]

ENDPOINTS = (
    "/api/jobs/",
    "/api/cluster_status",
    "/api/v0/actors?detail=1&limit=1000",
    "/api/v0/tasks?detail=1&limit=1000",
    "/api/v0/workers?detail=1&limit=1000",
    "/api/v0/runtime_envs?detail=1&limit=1000",
    "/api/v0/jobs?detail=1",
    "/api/v0/nodes?detail=1",
    "/nodes?view=summary",
    "/api/snapshot",
)


class LeakyJudge(SmallJudge):
    """Every third answer is an error that repeats the key, in one of the ways that servers have."""

    asked = answered = 0

    async def _complete(self, http: web.Request) -> web.Response:
        self.asked += 1
        header = http.headers.get("Authorization", "")
        match self.asked % 9:
            case 3:
                return web.json_response({"error": {"message": f"temporarily refused: {header}"}}, status=500)
            case 6:
                return web.json_response({"what": f"{header}"})
        reply = await super()._complete(http)
        self.answered += reply.status == 200
        return reply


def holding(folder: Path) -> list[str]:
    """Files below a folder that hold the key."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    return [str(file) for file in files if KEY.encode() in file.read_bytes()]


async def test_a_judges_key_is_nowhere(cluster, submit, folder, data, policy):
    judge, output = LeakyJudge(api_key=KEY), folder / "judged"
    server = TestServer(judge.app())
    await server.start_server()
    asked = {"kind": "llm", "model": "small", "base_url": str(server.make_url("/v1")), "api_key_env": KEY_NAME}
    keys = [f"judge.{name}={value}" for name, value in asked.items()] + ["judge.max_retries=4"]
    paths = (f"data={data}", f"policy={policy}", f"output={output}")
    size = ("max_steps=3", "groups_per_step=4", "group_size=4", "sampling.max_tokens=60")
    grpo = ("grpo", "--config", "configs/grpo.yaml", *paths, *size, *keys)
    printed = await asyncio.to_thread(lambda: finished(submit(*grpo)))
    assert judge.answered, "the key did not come into play"
    judge.api_key = "another"  # so that every call is refused: error texts, too
    wrong = await asyncio.to_thread(lambda: submit(*grpo, "resume=false").communicate()[0])
    await server.close()

    assert KEY not in printed + wrong
    headers = {"Authorization": f"Bearer {cluster.token}"}
    async with httpx.AsyncClient(base_url=cluster.address, headers=headers, timeout=60) as dashboard:
        replies = {path: await dashboard.get(path) for path in ENDPOINTS}
        jobs = replies["/api/jobs/"].json()
        replies |= {job["submission_id"]: await dashboard.get(f"/api/jobs/{job['submission_id']}/logs") for job in jobs}
    answered = [name for name, reply in replies.items() if reply.status_code == 200]
    assert {"/api/jobs/", "/api/v0/actors?detail=1&limit=1000"} <= set(answered)
    assert not [name for name, reply in replies.items() if KEY in reply.text]
    assert "grpo" in json.dumps(jobs)
    session = Path(cluster.session)
    assert (session / "logs").is_dir()
    assert not holding(session / "logs")
    assert not holding(folder)  # datasets, checkpoints, metrics, reports, configurations of runs
