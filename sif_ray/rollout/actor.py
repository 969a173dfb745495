"""The Ray shell around a rollout engine."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import ray

from sif_ray.observe.stacks import task_stacks, thread_stacks
from sif_ray.records import RolloutGroup
from sif_ray.rollout.request import RolloutRequest
from sif_ray.rollout.weights import Receipt, WeightUpdate

if TYPE_CHECKING:
    from sif_ray.rollout.engine import RolloutEngine

MAX_CALLS = 4096  # prompts under way in one engine; vLLM queues what does not fit into its batch


@ray.remote(max_concurrency=MAX_CALLS, concurrency_groups={"stacks": 1})
class RolloutActor:
    """`RolloutEngine` in a process of its own; takes its arguments.

    Place it with `.options(num_cpus=config.num_cpus, num_gpus=config.num_gpus)`. When this process dies, so do the
    engine's. A call to a dead engine raises `EngineDiedError`: kill the actor and start another.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from sif_ray.rollout.engine import RolloutEngine  # takes seconds to import: not in the process of the loop

        self._engine: RolloutEngine = RolloutEngine(*args, **kwargs)
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """Start the engine and answer one small prompt, so that the first real one is not slow."""
        self._loop = asyncio.get_running_loop()
        await self._engine.start()
        await self._engine.warm_up()

    async def generate(self, request: RolloutRequest) -> RolloutGroup:
        """See `RolloutEngine.generate`."""
        return await self._engine.generate(request)

    async def update_weights(self, update: WeightUpdate) -> Receipt:
        """See `RolloutEngine.update_weights`; the buckets are references into the object store."""
        return await self._engine.update_weights(update)

    async def version(self) -> int:
        """Policy version that generates now."""
        return self._engine.version

    @ray.method(concurrency_group="stacks")
    async def stacks(self) -> str:
        """Where this process is. Answers from a thread of its own, also when the engine's event loop is blocked."""
        return f"{task_stacks(self._loop)}\n{thread_stacks()}"

    async def shutdown(self) -> None:
        """End the engine's processes; the actor itself stays."""
        await self._engine.shutdown()
