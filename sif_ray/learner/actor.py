"""Learner ranks as Ray actors, and the driver's handle on all of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError

from sif_ray.config import GrpoConfig
from sif_ray.learner import process_group
from sif_ray.learner.microbatches import spread
from sif_ray.records import FloatArray, RolloutGroup, ScoredGroup
from sif_ray.rollout.weights import WeightUpdate, make_update
from sif_ray.rollout.wire import Outbox, SentByActor

if TYPE_CHECKING:
    from sif_ray.learner.engine import LearnerEngine

DEATH_NOTICE_S = 10.0  # after a rank's error, for Ray to say that it is the death of another: peers may see it first


class LearnerDied(RuntimeError):
    """A rank is gone, and with it what all ranks together held: start a new group and load the last checkpoint."""


class LearnerActor:
    """One rank: places a `LearnerEngine`, delegates to it and hands its weights to the object store."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        self._store: Any = None
        self._engine: LearnerEngine

    def open_store(self) -> tuple[str, int]:
        """Rank 0 opens the store at which ranks meet; returns its address."""
        host = ray.util.get_node_ip_address()
        self._store = process_group.open_store(host)
        return host, int(self._store.port)

    def start(self, config: GrpoConfig, total_steps: int, host: str, port: int) -> None:
        """Meet the other ranks and load the policy."""
        from sif_ray.learner.engine import LearnerEngine  # takes seconds to import: not in the process of the loop

        if self._store is None:
            self._store = process_group.reach_store(host, port)
        process_group.join(self._rank, self._world_size, self._store)
        self._outbox = None if config.weight_transfer == "object_store" else Outbox(config.weight_transfer)
        self._engine = LearnerEngine(
            config.learner,
            config.policy,
            total_steps=total_steps,
            objective=config.objective,
            sampling=config.sampling,
            max_pixels=config.max_pixels,
        )

    def train(self, groups: Sequence[ScoredGroup], version: int) -> dict[str, float]:
        return self._engine.train_step(groups, version)

    def log_probs(self, groups: Sequence[RolloutGroup]) -> list[list[FloatArray]]:
        return self._engine.log_probs(groups)

    def publish(self, version: int) -> WeightUpdate | None:
        """The weights, from rank 0, in the object store or held to be sent; other ranks take part in the gathers."""
        if self._rank == 0:
            if self._outbox is None:
                return make_update(version, self._engine.weight_buckets(own=False), put=ray.put)
            update = make_update(version, self._engine.weight_buckets(own=False))
            return self._outbox.hold(update, SentByActor(ray.get_runtime_context().current_actor, version))
        for _ in self._engine.weight_buckets():
            pass
        return None

    def send(self, version: int, host: str, port: int, num_workers: int) -> None:
        """Send a published version to the workers of one engine."""
        assert self._outbox is not None
        self._outbox.send(version, host, port, num_workers)

    def save_policy(self, output: str) -> None:
        self._engine.save_policy(output)

    def save_checkpoint(self, folder: str, client_state: dict[str, Any]) -> None:
        self._engine.save_checkpoint(folder, client_state)

    def load_checkpoint(self, folder: str) -> dict[str, Any]:
        return self._engine.load_checkpoint(folder)


class LearnerGroup:
    """All ranks of the learner, seen from the loop. Every call runs on every rank and fails if any rank does: with
    `LearnerDied` as soon as the process of a rank is gone, else with the rank's own error.

    Example:
        learner = LearnerGroup(config)
        await learner.start(total_steps=150)
        metrics = await learner.train(groups, version=0)
        update = await learner.publish(version=1)
        learner.shutdown()
    """

    def __init__(self, config: GrpoConfig, options: Callable[[str], Mapping[str, Any]] | None = None) -> None:
        """`options` gives the Ray options of the actor of a name ("learner 0", ...), e.g. its place on the cluster; by
        default they are the CPUs and GPUs of `config.learner`, anywhere."""
        self._config = config
        learner = config.learner
        anywhere = {"num_cpus": learner.num_cpus_per_rank, "num_gpus": learner.num_gpus_per_rank}
        actor = ray.remote(LearnerActor)
        self._ranks = [
            actor.options(**(options(f"learner {rank}") if options else anywhere)).remote(rank, learner.num_ranks)
            for rank in range(learner.num_ranks)
        ]

    async def start(self, total_steps: int) -> None:
        """Load the policy on every rank; `total_steps` optimiser updates are the learning-rate schedule's length."""
        host, port = await self._call(0, "open_store")
        await self._on_every_rank("start", self._config, total_steps, host, port)

    async def train(self, groups: Sequence[ScoredGroup], version: int) -> dict[str, float]:
        """One step on the groups, at least one, spread over the ranks by tokens; the metrics of the whole step."""
        costs = [len(scored.group.prompt_token_ids_P) + scored.group.num_tokens for scored in groups]
        shares = [[groups[index] for index in share] for share in spread(costs, len(self._ranks))]
        calls = [self._call(rank, "train", share, version) for rank, share in enumerate(shares)]
        return (await self._together(calls))[0]

    async def publish(self, version: int) -> WeightUpdate:
        """The current weights, labelled `version`, in the object store."""
        return (await self._on_every_rank("publish", version))[0]

    async def log_probs(self, groups: Sequence[RolloutGroup]) -> list[list[FloatArray]]:
        """Log-probs of every rollout's tokens under the current weights, [group][rollout] (T,)."""
        return (await self._on_every_rank("log_probs", groups))[0]

    async def save_policy(self, output: str) -> None:
        """Write a Hugging Face checkpoint folder."""
        await self._on_every_rank("save_policy", output)

    async def save_checkpoint(self, folder: str, client_state: dict[str, Any]) -> None:
        """Write weights, optimiser and `client_state` (plain values), to resume from."""
        await self._on_every_rank("save_checkpoint", folder, client_state)

    async def load_checkpoint(self, folder: str) -> dict[str, Any]:
        """Resume from the newest checkpoint in `folder`; returns its client state."""
        return (await self._on_every_rank("load_checkpoint", folder))[0]

    async def check_alive(self) -> None:
        """Raise `LearnerDied` if the process of a rank is gone. Waits for at most `DEATH_NOTICE_S`."""
        with contextlib.suppress(TimeoutError):  # a rank that is busy
            await asyncio.wait_for(self._on_every_rank("__ray_ready__"), DEATH_NOTICE_S)

    def shutdown(self) -> None:
        """End the ranks, whatever they are doing."""
        for rank in self._ranks:
            ray.kill(rank)

    async def _on_every_rank(self, method: str, *arguments: Any) -> list[Any]:
        return await self._together([self._call(rank, method, *arguments) for rank in range(len(self._ranks))])

    async def _together(self, calls: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
        """The results of one call per rank, or the first error; a death counts before the errors that it causes."""
        tasks = [asyncio.ensure_future(call) for call in calls]
        try:
            return await asyncio.gather(*tasks)
        except RayError:
            await _raise_death(tasks)
            raise

    async def _call(self, rank: int, method: str, *arguments: Any) -> Any:
        try:
            return await getattr(self._ranks[rank], method).remote(*arguments)
        except (RayActorError, OutOfMemoryError) as error:
            raise LearnerDied(
                f"rank {rank} of {len(self._ranks)} died in {method}: {str(error).splitlines()[0]}; start a "
                "new learner from the last checkpoint"
            ) from error


async def _raise_death(calls: Sequence[asyncio.Future[Any]]) -> None:
    """Raise `LearnerDied` if one of the calls does within `DEATH_NOTICE_S`."""
    with contextlib.suppress(TimeoutError):
        for call in asyncio.as_completed(calls, timeout=DEATH_NOTICE_S):
            with contextlib.suppress(RayError):
                await call
