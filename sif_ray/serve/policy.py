"""The policy's engine as a deployment."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from ray import serve

from sif_ray.config import ServeConfig
from sif_ray.rollout.engine import RolloutEngine, RolloutRequest
from sif_ray.rollout.errors import EngineDiedError, RolloutRequestError
from sif_ray.serve.backends import Ask, Generation, Refused


@serve.deployment(logging_config={"enable_access_log": False})  # the gateway writes one line per request
class Policy:
    async def __init__(self, config: ServeConfig) -> None:
        self._engine = RolloutEngine(
            config.policy, config.engine, config.prompt, max_pixels=config.max_pixels, adapters=config.adapters
        )
        self._requests = 0
        self._died = ""
        await self._engine.start()
        await self._engine.warm_up()

    async def generate(self, ask: Ask) -> Generation | Refused:
        """The whole output."""
        started_s = time.monotonic()
        try:
            group = await self._engine.generate(self._request(ask))
        except RolloutRequestError as error:
            return Refused(str(error))
        except EngineDiedError as error:
            self._died = str(error)
            raise
        [rollout] = group.rollouts
        return Generation(
            rollout.text,
            group.newest_version,
            num_prompt_tokens=len(group.prompt_token_ids_P),
            num_tokens=group.num_tokens,
            finish_reason=rollout.finish_reason,
            engine_s=time.monotonic() - started_s,
        )

    async def stream(self, ask: Ask) -> AsyncIterator[Generation | Refused]:
        """The output while it is written; a refusal comes first and alone."""
        try:
            async for delta in self._engine.stream(self._request(ask)):
                yield Generation(
                    delta.text,
                    self._engine.version,
                    num_prompt_tokens=delta.num_prompt_tokens,
                    num_tokens=delta.num_tokens,
                    finish_reason=delta.finish_reason,
                )
        except RolloutRequestError as error:
            yield Refused(str(error))
        except EngineDiedError as error:
            self._died = str(error)
            raise

    def _request(self, ask: Ask) -> RolloutRequest:
        self._requests += 1
        name = f"request-{self._requests}"
        return RolloutRequest(
            name,
            name,
            ask.question,
            ask.images,
            1,
            ask.sampling,
            seed=ask.seed,
            messages=ask.messages,
            adapter=ask.adapter,
        )

    async def check_health(self) -> None:
        """Serve replaces a replica whose engine is gone."""
        if self._died:
            raise RuntimeError(self._died)

    async def __del__(self) -> None:
        await self._engine.shutdown()
