"""The policy's engine as a deployment."""

from __future__ import annotations

from ray import serve

from sif_ray.config import SamplingConfig, ServeConfig
from sif_ray.rollout.engine import RolloutEngine, RolloutRequest
from sif_ray.rollout.errors import EngineDiedError, RolloutRequestError
from sif_ray.serve.service import Generation, Refused


@serve.deployment(logging_config={"enable_access_log": False})  # the gateway writes one line per request
class Policy:
    async def __init__(self, config: ServeConfig) -> None:
        self._sampling = SamplingConfig(temperature=config.temperature, max_tokens=config.max_tokens)
        self._engine = RolloutEngine(config.policy, config.engine, config.prompt, max_pixels=config.max_pixels)
        self._requests = 0
        self._died = ""
        await self._engine.start()
        await self._engine.warm_up()

    async def generate(self, question: str, images: tuple[bytes, ...]) -> Generation | Refused:
        """The output for encoded images, (rgb, depth) or (rgb,)."""
        self._requests += 1
        name = f"request-{self._requests}"
        try:
            group = await self._engine.generate(RolloutRequest(name, name, question, images, 1, self._sampling))
        except RolloutRequestError as error:
            return Refused(str(error))
        except EngineDiedError as error:
            self._died = str(error)
            raise
        return Generation(group.rollouts[0].text, group.newest_version)

    async def check_health(self) -> None:
        """Serve replaces a replica whose engine is gone."""
        if self._died:
            raise RuntimeError(self._died)

    async def __del__(self) -> None:
        await self._engine.shutdown()
