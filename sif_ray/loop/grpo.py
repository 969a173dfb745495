"""The asynchronous GRPO loop.

    prompts ─► LEDGER ──lease──► ENGINE n× ──group──► SCORER k× ──scored──► LEDGER ──batch──► LEARNER
                 ▲   _dispatch:     │  _roll_out: holds    _score: waits on    │   _learn: waits while     │
                 │   waits while    │  an engine slot      the judge, holds    │   fewer than a batch is   │
                 │   the engine is  │  until the last      no engine slot      │   scored, or a late group │
                 │   full or        │  token is written                        │   would become too old    │
                 │   updating, or   │                                          │                           │
                 │   the window is  └── _expire_leases: a lease nobody         │                           │
                 │   full               answers returns to the ledger          │                           │
                 └───── _sync: version V+1 to every engine; an engine leases again after its receipt ◄─────┘

Nobody polls: every change of the ledger wakes whoever waits on it. Generation, scoring and training overlap as far as
the ledger's window allows (see `sif_ray.loop.ledger`); with max_staleness = 0 they take turns. Requests in flight go on
through a weight update, and their tokens say which version wrote them. An error in any task ends the run.

Engines, scorers, the learner and the ledger come as small interfaces: Ray actors in a run, plain objects in a test or
under a debugger.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from sif_ray.config import GrpoConfig
from sif_ray.loop.ledger import Batch, Lease, Ledger
from sif_ray.loop.rewarder import GroupScores, ScoringFailed
from sif_ray.method.progress import ProgressRecord
from sif_ray.observe.progress import Progress
from sif_ray.records import FloatArray, RolloutGroup, Sample, ScoredGroup
from sif_ray.rollout.engine import RolloutRequest
from sif_ray.rollout.errors import RolloutRequestError
from sif_ray.rollout.weights import Receipt, WeightUpdate

log = logging.getLogger(__name__)

Result = TypeVar("Result")

PROBE_ROLLOUTS = 2
PROBE_TOKENS = 64  # per rollout: enough for a mean, and the learner waits for them


class LoopError(RuntimeError):
    """The run cannot go on; the message names the part that failed."""


class Engine(Protocol):
    """A rollout engine (`sif_ray.rollout.engine.RolloutEngine`, or its actor)."""

    async def generate(self, request: RolloutRequest) -> RolloutGroup: ...

    async def update_weights(self, update: WeightUpdate) -> Receipt: ...


class Scorer(Protocol):
    """Rewards of a group (`sif_ray.loop.rewarder.Rewarder`, or its actor)."""

    async def score(
        self, texts_G: Sequence[str], sample: Sample, previous: float | None
    ) -> GroupScores | ScoringFailed: ...


class Learner(Protocol):
    """All learner ranks together. Version V is the policy after V training steps."""

    async def train(self, groups: Sequence[ScoredGroup], version: int) -> dict[str, float]:
        """One step from `version` to the next; returns its metrics."""
        ...

    async def publish(self, version: int) -> WeightUpdate:
        """The current weights, labelled `version`."""
        ...

    async def log_probs(self, groups: Sequence[RolloutGroup]) -> list[list[FloatArray]]:
        """Log-probs of every rollout's tokens under the current weights, [group][rollout] (T,)."""
        ...


class MetricsSink(Protocol):
    """`sif_ray.observe.metrics.MetricsLog`."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...


class TimelineSink(Protocol):
    """`sif_ray.observe.timeline.Timeline`; times in unix seconds."""

    def span(self, lane: str, kind: str, start_s: float, end_s: float, **labels: Any) -> None: ...


@dataclass
class _Slot:
    """What the loop knows about one engine."""

    name: str
    engine: Engine
    version: int
    updating: bool = False
    in_flight: set[Lease] = field(default_factory=set)  # also leases that have expired, until the engine answers


class GrpoLoop:
    """Runs GRPO until every ticket of the ledger is trained or dropped.

    Invariants: an engine leases only with the version of its last receipt; the parity probe compares engine and learner
    while both hold the same version; a group is trained at most once because only the ledger hands out batches.
    """

    def __init__(
        self,
        config: GrpoConfig,
        samples: Mapping[str, Sample],
        ledger: Ledger,
        record: ProgressRecord,
        *,
        engines: Sequence[Engine],
        scorers: Sequence[Scorer],
        learner: Learner,
        metrics: MetricsSink,
        timeline: TimelineSink,
        progress: Progress | None = None,
    ) -> None:
        """Engines and learner must hold the policy of version `ledger.version` already. `samples`: by sample id."""
        self._config = config
        self._samples = samples
        self._ledger = ledger
        self._record = record
        self._slots = [_Slot(f"engine {i}", engine, ledger.version) for i, engine in enumerate(engines)]
        self._scorers = itertools.cycle([(f"reward {i}", scorer) for i, scorer in enumerate(scorers)])
        self._learner = learner
        self._metrics = metrics
        self._timeline = timeline
        self._progress = progress
        # One group more than an engine runs at once waits inside it, so that a finished one is replaced without delay.
        self._groups_per_engine = -(-config.engine.max_num_seqs // config.group_size) + 1
        self._scored: dict[str, ScoredGroup] = {}  # by ticket id, scored and not taken yet
        self._rollouts: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Train to the end. Raises the first error of any task, and `LoopError` when no batch could be trained."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for slot in self._slots:
                    tasks.create_task(self._dispatch(slot, tasks))
                watch = tasks.create_task(self._expire_leases())
                await self._learn()
                for task in (watch, *self._rollouts):  # rollouts of expired leases: nobody waits for them
                    task.cancel()
        except ExceptionGroup as errors:
            first, *others = _leaves(errors)
            for other in others:
                log.error("a second error while the run was ending: %r", other)
            raise first from None
        dropped = self._ledger.dropped()
        if dropped:
            log.warning("%d of %d prompts were dropped: %s", len(dropped), self._ledger.num_tickets, _reasons(dropped))
        if self._ledger.version == 0 and self._ledger.num_tickets:
            raise LoopError(f"no group could be trained; all {len(dropped)} prompts were dropped: {_reasons(dropped)}")

    # --- generation --------------------------------------------------------------------------------------------------

    async def _dispatch(self, slot: _Slot, tasks: asyncio.TaskGroup) -> None:
        """Keep one engine full while the window allows; the engine with the fewest requests goes first."""

        def next_lease() -> Lease | None:
            if slot.updating or len(slot.in_flight) >= self._groups_per_engine:
                return None
            if any(len(other.in_flight) < len(slot.in_flight) for other in self._slots if not other.updating):
                return None
            return self._ledger.lease(slot.version)

        while (lease := await self._until(next_lease)) is not None:
            slot.in_flight.add(lease)
            self._notify()  # another engine has the fewest requests now
            rollout = tasks.create_task(self._roll_out(slot, lease))
            self._rollouts.add(rollout)
            rollout.add_done_callback(self._rollouts.discard)

    async def _roll_out(self, slot: _Slot, lease: Lease) -> None:
        """Follow one ticket from its lease to its rewards."""
        started_s = time.time()
        try:
            with _noting(f"{slot.name} generated ticket {lease.ticket_id}"):
                group = await slot.engine.generate(self._request(lease))
        except RolloutRequestError as error:
            log.warning("ticket %s is dropped: %s", lease.ticket_id, error)
            self._ledger.failed(lease, f"request refused: {error}", retry=False)
            return
        finally:
            slot.in_flight.discard(lease)
            self._notify()
        self._timeline.span(slot.name, "generate", started_s, time.time(), step=lease.version)
        if self._ledger.generated(lease, group.oldest_version):
            await self._score(lease, group)

    async def _score(self, lease: Lease, group: RolloutGroup) -> None:
        name, scorer = next(self._scorers)
        started_s = time.time()
        with _noting(f"{name} scored ticket {lease.ticket_id}"):
            scores = await scorer.score(
                [rollout.text for rollout in group.rollouts],
                self._samples[lease.sample_id],
                self._record.previous(lease.sample_id, lease.epoch),
            )
        self._timeline.span(name, "score", started_s, time.time(), step=lease.version)
        if isinstance(scores, ScoringFailed):
            log.warning("ticket %s has no rewards: %s", lease.ticket_id, scores.reason)
            self._ledger.failed(lease, scores.reason, retry=scores.retry)
        elif self._ledger.scored(lease):
            self._scored[lease.ticket_id] = ScoredGroup(group, scores.rewards_G, scores.terms_G)
            self._record.update(lease.sample_id, scores.terms_G["answer_score"].tolist(), lease.epoch)
        self._notify()

    async def _expire_leases(self) -> None:
        """Take back leases whose time is over; end the run when an engine is full of requests it does not answer."""
        every_s = min(1.0, self._config.lease_timeout_s / 10)
        while True:
            await asyncio.sleep(every_s)
            for lease in self._ledger.expire():
                log.warning("ticket %s: the lease of attempt %d has expired", lease.ticket_id, lease.attempt)
                self._notify()
            for slot in self._slots:
                full = len(slot.in_flight) >= self._groups_per_engine
                if full and not any(self._ledger.holds(lease) for lease in slot.in_flight):
                    raise LoopError(
                        f"{slot.name} has answered none of its {len(slot.in_flight)} requests within lease_timeout_s = "
                        f"{self._config.lease_timeout_s:g}; raise it, or lower engine.max_num_seqs or "
                        "sampling.max_tokens"
                    )

    def _request(self, lease: Lease) -> RolloutRequest:
        sample = self._samples[lease.sample_id]
        return RolloutRequest(
            ticket_id=lease.ticket_id,
            sample_id=sample.sample_id,
            question=sample.question,
            images=(sample.image, sample.depth_image) if self._config.prompt.depth_image else (sample.image,),
            num_rollouts=self._config.group_size,
            sampling=self._config.sampling,
            seed=_seed(self._config.seed, lease.ticket_id, lease.attempt),
        )

    # --- training ----------------------------------------------------------------------------------------------------

    async def _learn(self) -> None:
        """Take a batch, train, hand the new weights to every engine, and again."""
        ended_s = time.time()
        while True:
            started_s = time.time()
            version = self._ledger.version
            async with asyncio.TaskGroup() as waiting:
                probe = waiting.create_task(self._parity_if_due(version))
                batch = await self._until(self._ledger.take_batch)
            if batch is None:
                return
            self._timeline.span("learner 0", "wait", started_s, time.time(), step=version)
            groups = [self._scored.pop(ticket_id) for ticket_id in batch.ticket_ids]
            trained = await self._train(groups, batch)
            synced = await self._sync(self._ledger.trained(batch))
            now_s = time.time()
            values = batch_metrics(groups, now_s - ended_s) | trained | probe.result() | synced
            ended_s = now_s
            self._metrics.log(self._ledger.version, values | {"tickets_dropped": self._ledger.counts()["dropped"]})
            if self._progress is not None:
                self._progress.advance(reward=values["reward/total"], staleness=values.get("staleness_max", 0.0))

    async def _train(self, groups: Sequence[ScoredGroup], batch: Batch) -> dict[str, float]:
        started_s = time.time()
        with _noting(f"the learner trained version {batch.version}"):
            metrics = await self._learner.train(groups, batch.version)
        self._timeline.span("learner 0", "train", started_s, time.time(), step=batch.version)
        return metrics

    async def _sync(self, version: int) -> dict[str, float]:
        """Bring every engine to `version`; each leases again as soon as its own receipt is right."""
        self._notify()
        started_s = time.time()
        with _noting(f"the learner published version {version}"):
            update = await self._learner.publish(version)
        async with asyncio.TaskGroup() as updates:
            for slot in self._slots:
                updates.create_task(self._update(slot, update))
        ended_s = time.time()
        self._timeline.span("sync", "sync", started_s, ended_s, step=version)
        return {"sync_s": ended_s - started_s, "sync_bytes": float(update.num_bytes * len(self._slots))}

    async def _update(self, slot: _Slot, update: WeightUpdate) -> None:
        slot.updating = True
        with _noting(f"{slot.name} received version {update.version}"):
            receipt = await slot.engine.update_weights(update)
        wanted = (update.version, len(update.tensors), update.checksum)
        found = (receipt.version, receipt.num_tensors, receipt.checksum)
        if found != wanted:
            raise LoopError(
                f"{slot.name}: the receipt says (version, tensors, checksum) = {found}, published were {wanted}"
            )
        slot.version, slot.updating = update.version, False
        self._notify()

    # --- parity ------------------------------------------------------------------------------------------------------

    async def _parity_if_due(self, version: int) -> dict[str, float]:
        if version % self._config.parity_every or self._ledger.done:
            return {}
        return {"parity_mean_abs": await self._probe_parity(version)}

    async def _probe_parity(self, version: int) -> float:
        """Mean |log-prob of the engine - log-prob of the learner| over fresh tokens, of the engine where it is largest.

        Called when engines and learner hold `version`, and finished before the learner steps: the same weights on both
        sides, so the difference is numerics and errors of the weight transfer, not staleness.
        """
        with _noting(f"the parity probe ran at version {version}"):
            groups = await asyncio.gather(
                *(slot.engine.generate(self._probe_request(version, slot.name)) for slot in self._slots)
            )
            learner_logprobs = await self._learner.log_probs(groups)
        deltas = []
        for slot, group, logprobs in zip(self._slots, groups, learner_logprobs, strict=True):
            if not group.oldest_version == group.newest_version == version:
                raise LoopError(
                    f"{slot.name}: probe tokens are of versions {group.oldest_version} to {group.newest_version}, "
                    f"the engine should hold {version}"
                )
            pairs = zip(group.rollouts, logprobs, strict=True)
            deltas.append(float(np.mean(np.concatenate([abs(rollout.logprobs_T - own) for rollout, own in pairs]))))
        worst = int(np.argmax(deltas))
        if not deltas[worst] <= self._config.parity_alarm:
            log.warning(
                "version %d: log-probs of %s and the learner differ by %.4g in the mean (parity_alarm = %g)",
                version,
                self._slots[worst].name,
                deltas[worst],
                self._config.parity_alarm,
            )
        return deltas[worst]

    def _probe_request(self, version: int, engine: str) -> RolloutRequest:
        samples = list(self._samples)
        lease = Lease(f"probe/{version}/{engine}", samples[version % len(samples)], 0, 0, version, 0.0)
        # Without truncation of the distribution: the learner's log-probs are over the whole vocabulary.
        tokens = min(PROBE_TOKENS, self._config.sampling.max_tokens)
        sampling = replace(self._config.sampling, top_p=1.0, top_k=0, max_tokens=tokens)
        return replace(self._request(lease), num_rollouts=PROBE_ROLLOUTS, sampling=sampling)

    # --- waiting -----------------------------------------------------------------------------------------------------

    async def _until(self, attempt: Callable[[], Result | None]) -> Result | None:
        """What `attempt` gives, tried now and after every change; None when the run is over."""
        while not self._ledger.done:
            changed = self._changed
            result = attempt()
            if result is not None:
                return result
            await changed.wait()
        return None

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def batch_metrics(groups: Sequence[ScoredGroup], seconds: float) -> dict[str, float]:
    """What a batch says about rollouts and rewards; rates are per second of `seconds`, the step's share of the run."""
    rollouts = [rollout for scored in groups for rollout in scored.group.rollouts]
    lengths = [len(rollout.token_ids_T) for rollout in rollouts]

    def mean_of(term: str) -> float:
        return float(np.mean(np.concatenate([scored.terms_G[term] for scored in groups])))

    return {
        "reward/total": float(np.mean(np.concatenate([scored.rewards_G for scored in groups]))),
        **{f"reward/{term}": mean_of(term) for term in ("format", "answer", "box", "depth")},
        "answer_score": mean_of("answer_score"),
        "iou_last": mean_of("iou_last"),
        "groups_no_spread": float(sum(np.ptp(scored.rewards_G) == 0 for scored in groups)),
        "completions_per_s": len(rollouts) / seconds,
        "generated_tokens_per_s": sum(lengths) / seconds,
        "completion_tokens_mean": float(np.mean(lengths)),
        "truncated_share": float(np.mean([rollout.finish_reason == "length" for rollout in rollouts])),
    }


def _seed(run_seed: int, ticket_id: str, attempt: int) -> int:
    """A sampling seed of its own for every attempt of every ticket, the same in every run."""
    words = np.frombuffer(f"{run_seed}/{ticket_id}/{attempt}".encode(), dtype=np.uint8)
    return int(np.random.SeedSequence(words.tolist()).generate_state(1)[0] >> 1)


def _reasons(dropped: Mapping[str, str]) -> str:
    counts: dict[str, int] = {}
    for reason in dropped.values():
        counts[reason] = counts.get(reason, 0) + 1
    return "; ".join(f"{count}x {reason}" for reason, count in sorted(counts.items(), key=lambda item: -item[1])[:3])


def _leaves(errors: ExceptionGroup[Exception]) -> Iterator[Exception]:
    for error in errors.exceptions:
        if isinstance(error, ExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


@contextlib.contextmanager
def _noting(what: str) -> Iterator[None]:
    """Add to an error what the loop was doing."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in the GRPO loop, while {what}")
        raise
