"""An LLM judge between real servers on loopback."""

from __future__ import annotations

import contextlib
import io
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from faulty_http import FaultyProxy, served
from judge_servers import SmallJudge
from PIL import Image

from sif_ray.config import JudgeConfig
from sif_ray.judge import caller
from sif_ray.judge.llm import LlmJudge


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caller, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
def photo() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def server() -> SmallJudge:
    return SmallJudge()


@pytest.fixture
def proxy(server: SmallJudge) -> Iterator[FaultyProxy]:
    """In front of `server`; its address is `proxy.url`."""
    with served(server.app()) as upstream:
        proxy = FaultyProxy(upstream)
        with served(proxy.app()) as proxy.url:
            yield proxy


@pytest.fixture
def judging(proxy: FaultyProxy, tmp_path: Path) -> Callable[..., contextlib.AbstractAsyncContextManager[LlmJudge]]:
    """`async with judging(max_retries=0) as judge`: one worker's judge in the folder `tmp_path`."""

    @contextlib.asynccontextmanager
    async def make(*, api_key: str = "", worker: str = "0", num_workers: int = 1, **changes) -> AsyncIterator[LlmJudge]:
        settings = {
            "kind": "llm",
            "model": "judge",
            "base_url": f"{proxy.url}/v1",
            "timeout_s": 30.0,
            "max_wait_s": 0.0,
            "breaker_cooldown_s": 0.05,
        }
        judge = LlmJudge(JudgeConfig(**settings | changes), api_key, tmp_path, worker, num_workers)
        try:
            yield judge
        finally:
            await judge.close()

    return make
