"""Ray actors as workers of a pool."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from sif_ray.loop.pool import WorkerDiedError
from sif_ray.observe.timeline import Timeline

log = logging.getLogger(__name__)

SHUTDOWN_TIMEOUT_S = 25.0  # for a worker to end what it has started, an engine takes 20 s at most; then it is killed
STACKS_TIMEOUT_S = 5.0
MAX_CAUSE_CHARS = 300  # of Ray's report about a death, which is a page


class Remote:
    """An actor behind the interface of the object inside it: `await remote.score(...)` instead of
    `await actor.score.remote(...)`.

    Raises the object's own errors, and `WorkerDiedError` when the actor's process is gone.
    """

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self.actor, name)

        async def call(*arguments: Any) -> Any:
            try:
                return await method.remote(*arguments)
            except RayTaskError as error:
                raise error.cause from error
            except (RayActorError, ObjectLostError, OutOfMemoryError) as error:  # the last: Ray's memory monitor
                raise WorkerDiedError(_cause(error)) from error

        return call


class ActorFactory:
    """Makes the actors of one pool. `make(name)` places one; `start` and `shutdown` are methods that it has.

    Example: `ActorFactory(lambda name: RolloutActor.remote(...), start="start", shutdown="shutdown")`.
    """

    def __init__(
        self,
        make: Callable[[str], Any],
        *,
        start: str = "__ray_ready__",
        shutdown: str = "",
        timeline: Timeline | None = None,
    ) -> None:
        """`timeline` is told how long each start took."""
        self._make = make
        self._start = start
        self._shutdown = shutdown
        self._timeline = timeline

    async def start(self, name: str) -> Remote:
        """A started actor; waits as long as the cluster has no room for it. Kills it when it fails or is cancelled."""
        started_s = time.time()
        remote = Remote(self._make(name))
        try:
            await getattr(remote, self._start)()
            if self._timeline is not None:
                self._timeline.span(name, "start", started_s, time.time())
        except BaseException:
            ray.kill(remote.actor)
            raise
        return remote

    async def end(self, worker: Remote) -> None:
        """Let the actor end what it has started, as far as it still answers, and kill it."""
        try:
            if self._shutdown:
                await asyncio.wait_for(getattr(worker.actor, self._shutdown).remote(), SHUTDOWN_TIMEOUT_S)
        except (RayError, TimeoutError) as error:
            log.debug("%s did not shut down by itself: %s", worker.actor, error)
        finally:
            ray.kill(worker.actor)

    async def stacks(self, worker: Remote) -> str:
        """What the actor's method `stacks` says, which needs a thread of its own."""
        try:
            return str(await asyncio.wait_for(worker.actor.stacks.remote(), STACKS_TIMEOUT_S))
        except (RayError, TimeoutError) as error:
            return f"not available ({type(error).__name__})"


def _cause(error: BaseException) -> str:
    """Ray's report about a death without the actor's particulars, on one line."""
    text = " ".join(str(error).split()).split("The actor is dead because ")[-1]
    return text if len(text) <= MAX_CAUSE_CHARS else text[:MAX_CAUSE_CHARS] + " ..."
