"""The judge that a configuration names."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from sif_ray.config import ConfigError, EndpointConfig, JudgeConfig
from sif_ray.judge.exact import ExactMatchJudge
from sif_ray.judge.outcome import Judge


def make_judge(config: JudgeConfig, folder: Path, worker: str = "0", num_workers: int = 1) -> Judge:
    """The judge of one reward worker among `num_workers`. An LLM judge keeps its cache and audit log in `folder`.

    Raises `ConfigError` when the environment lacks the key's variable.
    """
    if config.kind == "exact":
        return ExactMatchJudge()
    from sif_ray.judge.llm import LlmJudge  # here, because it takes a second to import

    return LlmJudge(config, read_api_key(config, "judge"), folder, worker, num_workers)


def check_judge(config: JudgeConfig) -> None:
    """Raise `ConfigError` when the judge cannot work. Asks an LLM judge one question, so a run with it can start."""
    if config.kind == "exact":
        return
    from sif_ray.judge.llm import check

    asyncio.run(check(config, read_api_key(config, "judge")))


def read_api_key(config: EndpointConfig, block: str) -> str:
    """The key in the variable that `config` names, "" where it names none; `block` is its place in a configuration.

    Raises `ConfigError` when the environment lacks the variable.
    """
    if not config.api_key_env:
        return ""
    key = os.environ.get(config.api_key_env, "")
    if not key:
        raise ConfigError(
            f"{block}.api_key_env = {config.api_key_env!r}: this environment variable is not set; put the key into it"
        )
    return key
