"""The asynchronous GRPO loop.

    prompts ─► LEDGER ──lease──► ENGINE n× ──group──► SCORER k× ──scored──► LEDGER ──batch──► LEARNER
                 ▲   _dispatch:     │  _roll_out: holds    _score: waits on    │   _learn: waits while     │
                 │   waits while    │  an engine slot      the judge, holds    │   fewer than a batch is   │
                 │   every engine   │  until the last      no engine slot      │   scored, or a late group │
                 │   is full or     │  token is written                        │   would become too old    │
                 │   updating, or   │                                          │                           │
                 │   the window is  └── _watch: leases nobody answers return   │                           │
                 │   full               to the ledger; who is stuck is named   │                           │
                 └───── _sync: publishes version V+1; _attend brings it to each engine, which leases again ◄┘
                        after its receipt; waits for the engines that live and are not evaluating

    POOL of engines, POOL of scorers (`sif_ray.loop.pool`): who dies or is stuck is replaced. The leases of a lost
    engine return to the ledger at once; its successor joins when _attend has brought it to the published version. The
    groups of a lost scorer go to another one. _pinned lends an engine to the evaluation (`sif_ray.loop.evaluation`)
    and holds its next update back meanwhile.

Nobody polls for work: every change wakes whoever waits on it. Generation, scoring and training overlap as far as the
ledger's window allows (see `sif_ray.loop.ledger`); with max_staleness = 0 they take turns. Requests in flight go on
through a weight update, and their tokens say which version wrote them. An error in any task ends the run, unless it
is the death of an engine or a scorer.

Engines, scorers, the learner and the ledger come as small interfaces: Ray actors in a run, plain objects in a test or
under a debugger.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np

from sif_ray.clock import now_s
from sif_ray.config import GrpoConfig
from sif_ray.judge.outcome import JudgeUnavailable
from sif_ray.loop.checkpoint import RunState
from sif_ray.loop.evaluation import Evaluations
from sif_ray.loop.ledger import Batch, Lease, Ledger
from sif_ray.loop.parity import probe_parity
from sif_ray.loop.pool import Factory, Member, Pool, WorkerDiedError
from sif_ray.loop.requests import Ask, groups_per_engine, training_request
from sif_ray.loop.rewarder import GroupScores, ScoringFailed
from sif_ray.loop.step_metrics import batch_metrics, has_spread, judge_totals, receipt_metrics
from sif_ray.loop.watchdog import Watchdog, noting
from sif_ray.method.progress import ProgressRecord
from sif_ray.observe.idle import IdleClock
from sif_ray.observe.progress import Progress
from sif_ray.observe.stacks import task_stacks
from sif_ray.records import FloatArray, RolloutGroup, Sample, ScoredGroup
from sif_ray.rollout.errors import RolloutRequestError
from sif_ray.rollout.request import RolloutRequest
from sif_ray.rollout.weights import Receipt, WeightUpdate

log = logging.getLogger(__name__)

Result = TypeVar("Result")

NO_SPREAD = "no reward spread"


class LoopError(RuntimeError):
    """The run cannot go on; the message names the part that failed."""


class Engine(Protocol):
    """A rollout engine (`sif_ray.rollout.engine.RolloutEngine`, or its actor). Its death is an `EngineDiedError` or a
    `WorkerDiedError`."""

    async def generate(self, request: RolloutRequest) -> RolloutGroup: ...

    async def update_weights(self, update: WeightUpdate) -> Receipt: ...


class Scorer(Protocol):
    """Rewards of a group (`sif_ray.loop.rewarder.Rewarder`, or its actor). Its death is a `WorkerDiedError`; a
    `JudgeUnavailable` stops the run."""

    async def score(
        self, texts_G: Sequence[str], sample: Sample, previous: float | None
    ) -> GroupScores | ScoringFailed: ...

    async def metrics(self) -> dict[str, float]:
        """Totals of its judge, as "judge/..."."""
        ...


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


class CompletionSink(Protocol):
    """`sif_ray.observe.completions.CompletionLog`."""

    def keep(self, step: int, groups: Sequence[ScoredGroup]) -> None: ...


class TimelineSink(Protocol):
    """`sif_ray.observe.timeline.Timeline`; times in unix seconds."""

    def span(self, lane: str, kind: str, start_s: float, end_s: float, **labels: Any) -> None: ...


class TrailSink(Protocol):
    """`sif_ray.observe.trail.Trail`."""

    def trained(self, version: int, trained: Mapping[str, int]) -> None: ...


class _Slot(Member):
    """What the loop knows about one engine. It starts with the policy of version 0."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.version = 0
        self.receipt: Receipt | None = None  # of that version; version 0 has none
        self.updating = False
        self.evaluating = False  # keeps its version meanwhile
        self.idle = IdleClock()  # generation only
        self.leases: set[Lease] = set()  # also those that have expired, until the engine answers


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
        engines: Factory,
        scorers: Factory,
        learner: Learner,
        metrics: MetricsSink,
        timeline: TimelineSink,
        trail: TrailSink,
        save: Callable[[RunState], Awaitable[None]],
        groups: Mapping[str, ScoredGroup] | None = None,
        progress: Progress | None = None,
        completions: CompletionSink | None = None,
        eval_samples: Sequence[Sample] = (),
    ) -> None:
        """`engines` starts an `Engine` with the policy of version 0, `scorers` a `Scorer`; the learner must hold the
        policy of `ledger.version`.

        `save` keeps a state together with the learner, which holds that version until it returns. `samples`: by sample
        id. `groups`: those that the ledger has as scored, by ticket id. `eval_samples`: held out, answered every
        `config.eval_every` steps.
        """
        self._config = config
        self._samples = samples
        self._ledger = ledger
        self._record = record
        self._watchdog = Watchdog(config.stuck_after_s)
        self._engines: Pool[_Slot] = Pool(
            "engine",
            engines,
            self._watchdog,
            member=_Slot,
            attend=self._attend,
            take_back=self._take_back,
            changed=self._notify,
        )
        self._scorers: Pool[Member] = Pool(
            "reward",
            scorers,
            self._watchdog,
            member=Member,
            attend=self._attend_scorer,
            take_back=lambda scorer: f"{scorer.calls if scorer.worker else 0} groups go to another one",
            changed=self._notify,
        )
        self._learner = learner
        self._metrics = metrics
        self._timeline = timeline
        self._trail = trail
        self._save = save
        self._stopping = False
        self._outage: JudgeUnavailable | None = None
        self._progress = progress
        self._completions = completions
        self._learner_idle = IdleClock()
        self._judges: dict[str, dict[str, float]] = {}  # totals by scorer, as far as they have answered
        self._evaluations = Evaluations(config, eval_samples, pinned=self._pinned, score=self._score_heldout)
        self._logged: dict[str, float] = {}  # metrics of the last step
        self._published = ledger.version  # what engines should hold
        self._update: WeightUpdate | None = None  # with its weights; None for version 0 and while the next is published
        self._groups_per_engine = groups_per_engine(config.engine.max_num_seqs, config.group_size)
        self._scored = dict(groups or {})  # by ticket id, scored and not taken yet
        self._groups_replaced = 0  # since the last step, for want of reward spread
        self._rollouts: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._tasks: asyncio.TaskGroup

    async def run(self, learner_ready: Awaitable[Any] | None = None) -> None:
        """Train to the end, or to the end of the step in which `stop` is called, and save the state then. Engines and
        scorers are started, and ended with the run.

        `learner_ready` is awaited before the learner is asked for anything; engines start and generate meanwhile, or
        before, where they share GPUs with it.
        Raises the first error of any task, `PoolError` when an engine or a scorer cannot be replaced, `LoopError` when
        the learner is stuck or no batch could be trained, and `JudgeUnavailable` when the step is saved in which the
        judge was given up.
        """
        try:
            async with asyncio.TaskGroup() as self._tasks:
                for _ in range(self._config.num_engines):
                    self.add_engine()
                for _ in range(self._config.num_reward_workers):
                    self._scorers.add(self._tasks)
                self._tasks.create_task(self._dispatch(), name="dispatch")
                watch = self._tasks.create_task(self._watch(), name="watch")
                if self._config.placement.colocate:  # an engine that starts measures what is free of its GPU
                    await self._wait_for("the learner", "the engines", lambda: self._engines.all_started or None)
                if learner_ready is not None:
                    await self._ask_learner("start", learner_ready)
                if self._ledger.version:
                    await self._publish(self._ledger.version)
                self._evaluations.start_if_due(self._ledger.version, self._tasks)
                await self._learn()
                if self._ledger.version:
                    await self._checkpoint(self.state())
                if not self._stopping:
                    async for values in self._evaluations.rest(self._ledger.version):
                        # One more line for the last step; of two lines of a step the later counts.
                        self._metrics.log(self._ledger.version, self._logged | values)
                for task in (watch, *self._rollouts):  # nobody waits for what still runs of them
                    task.cancel()
                self._evaluations.cancel()
                self._engines.close()
                self._scorers.close()
        except ExceptionGroup as errors:
            first, *others = _leaves(errors)
            for other in others:
                log.error("a second error while the run was ending: %r", other)
            raise first from None
        if self._outage is not None:
            raise self._outage
        dropped = self._ledger.dropped()
        if dropped and self._ledger.done:
            log.warning("%d of %d prompts were dropped: %s", len(dropped), self._ledger.num_tickets, _reasons(dropped))
        if self._ledger.done and self._ledger.version == 0 and self._ledger.num_tickets:
            raise LoopError(f"no group could be trained; all {len(dropped)} prompts were dropped: {_reasons(dropped)}")

    def stop(self) -> None:
        """Train no further batch."""
        self._stopping = True
        self._notify()

    def state(self) -> RunState:
        """What a run can be continued from, while no batch is in training."""
        return RunState(self._ledger.state_dict(), self._record.state_dict(), dict(self._scored))

    @property
    def engine_names(self) -> list[str]:
        """The engines that were not told to go, started or not."""
        return self._engines.names

    def add_engine(self) -> str:
        """Start one more engine, which joins at the version that is published then. Returns its name; raises
        `ValueError` when the run is ending."""
        return self._engines.add(self._tasks)

    def remove_engine(self, name: str) -> None:
        """Give an engine no more leases; it ends when those in flight are answered or expired. Raises `ValueError` for
        an unknown engine and for the last one."""
        self._engines.remove(name)

    # --- engines and scorers -----------------------------------------------------------------------------------------

    async def _attend(self, slot: _Slot) -> None:
        """Keep an engine at the published version until it may go."""
        self._notify()  # it has started

        def due() -> WeightUpdate | str | None:
            if slot.draining and not slot.evaluating and not any(self._ledger.holds(lease) for lease in slot.leases):
                return "leave"
            if self._update is None or slot.version == self._update.version or slot.evaluating or slot.draining:
                return None
            return self._update

        while True:
            if not slot.ready and slot.version == self._published:
                slot.idle.take_share()  # its start does not count
                self._engines.join(slot, f" at version {slot.version}")
            step = await self._wait_for(slot.name, "the next version", due)
            if not isinstance(step, WeightUpdate):
                return
            await self._bring(slot, step)
            del step  # the store keeps an update's weights as long as anything here refers to them

    async def _bring(self, slot: _Slot, update: WeightUpdate) -> None:
        """Update one engine; it leases again when its receipt is right."""
        slot.updating = True
        with noting(f"{slot.name} received version {update.version}"):
            receipt = await self._engines.call(
                slot, f"update to version {update.version}", slot.worker.update_weights(update)
            )
        wanted = (update.version, len(update.tensors), update.checksum)
        found = (receipt.version, receipt.num_tensors, receipt.checksum)
        if found != wanted:
            raise LoopError(
                f"{slot.name}: the receipt says (version, tensors, checksum) = {found}, published were {wanted}"
            )
        slot.version, slot.receipt, slot.updating = update.version, receipt, False
        self._notify()

    def _take_back(self, slot: _Slot) -> str:
        returned = sum(self._ledger.returned(lease, "engine lost") for lease in slot.leases)
        return f"{returned} leases returned to the ledger"

    async def _attend_scorer(self, scorer: Member) -> None:
        self._scorers.join(scorer)
        await asyncio.Event().wait()

    async def _watch(self) -> None:
        """Take back leases whose time is over; name and end who is stuck."""
        every_s = min(1.0, self._config.lease_timeout_s / 10, (self._config.stuck_after_s or 10.0) / 10)
        while True:
            await asyncio.sleep(every_s)
            for lease in self._ledger.expire():
                log.warning("ticket %s: the lease of attempt %d has expired", lease.ticket_id, lease.attempt)
                self._notify()
            for slot in self._engines.ready:
                full = len(slot.leases) >= self._groups_per_engine
                if full and not any(self._ledger.holds(lease) for lease in slot.leases):
                    self._engines.give_up(
                        slot,
                        f"it has answered none of its {len(slot.leases)} requests within lease_timeout_s = "
                        f"{self._config.lease_timeout_s:g} (if it is only slow, raise that, or lower "
                        "engine.max_num_seqs or sampling.max_tokens)",
                    )
            for party, why in self._watchdog.stuck().items():
                await self._end_stuck(party, why)

    async def _end_stuck(self, party: str, why: str) -> None:
        """Say who is stuck and who waits for whom; give an engine or a scorer up, end the run for the learner."""
        report = self._watchdog.report()
        log.error("%s is stuck: it %s\n%s\n%s", party, why, report, task_stacks())
        for pool in (self._engines, self._scorers):
            member = pool.find(party)
            if member is not None:
                log.error("stacks of %s: %s", party, await pool.stacks(member))
                pool.give_up(member, f"it is stuck and {why}")
                return
        raise LoopError(f"{party} is stuck: it {why}; if it is only slow, raise stuck_after_s\n{report}")

    # --- generation --------------------------------------------------------------------------------------------------

    async def _dispatch(self) -> None:
        """Keep the engines full while the window allows; the engine with the fewest requests goes first."""

        def next_lease() -> tuple[_Slot, Lease] | None:
            for slot in sorted(self._engines.ready, key=lambda slot: len(slot.leases)):
                if not slot.updating and len(slot.leases) < self._groups_per_engine:
                    lease = self._ledger.lease(slot.version)
                    if lease is not None:
                        return slot, lease
            return None

        while (given := await self._until("dispatch", "an engine with room, and the window", next_lease)) is not None:
            slot, lease = given
            slot.leases.add(lease)
            rollout = self._tasks.create_task(self._roll_out(slot, lease))
            self._rollouts.add(rollout)
            rollout.add_done_callback(self._rollouts.discard)

    async def _roll_out(self, slot: _Slot, lease: Lease) -> None:
        """Follow one ticket from its lease to its rewards."""
        started_s = time.time()
        try:
            with noting(f"{slot.name} generated ticket {lease.ticket_id}"):
                group = await self._generate(slot, self._request(lease))
        except WorkerDiedError:  # the ticket went back together with all that the engine held
            return
        except RolloutRequestError as error:
            log.warning("ticket %s is dropped: %s", lease.ticket_id, error)
            self._ledger.failed(lease, f"request refused: {error}", retry=False)
            return
        finally:
            slot.leases.discard(lease)
            self._notify()
        lengths = {
            "prompt_tokens": len(group.prompt_token_ids_P),
            "tokens": [len(rollout.token_ids_T) for rollout in group.rollouts],
        }
        self._timeline.span(slot.name, "generate", started_s, time.time(), step=lease.version, **lengths)
        if self._ledger.generated(lease, group.oldest_version):
            await self._score(lease, group)

    def _request(self, lease: Lease) -> RolloutRequest:
        return training_request(self._config, self._samples[lease.sample_id], lease.ticket_id, lease.failures)

    async def _generate(self, slot: _Slot, request: RolloutRequest) -> RolloutGroup:
        with slot.idle:
            return await self._engines.call(slot, f"generate {request.ticket_id}", slot.worker.generate(request))

    async def _score(self, lease: Lease, group: RolloutGroup) -> None:
        texts_G = [rollout.text for rollout in group.rollouts]
        previous = self._record.previous(lease.sample_id, lease.epoch)
        sample = self._samples[lease.sample_id]
        scores = await self._scores_of(
            f"ticket {lease.ticket_id}", texts_G, sample, previous, wanted=lambda: self._ledger.holds(lease)
        )
        if not self._ledger.holds(lease):
            return
        if isinstance(scores, ScoringFailed) and self._outage is not None:
            return  # no fault of this ticket
        if isinstance(scores, ScoringFailed):
            log.warning("ticket %s has no rewards: %s", lease.ticket_id, scores.reason)
            self._ledger.failed(lease, scores.reason, retry=scores.retry)
        else:
            self._record.update(lease.sample_id, scores.terms_G["answer_score"].tolist(), lease.epoch)
            if self._config.dynamic_sampling and not has_spread(scores.rewards_G):
                self._ledger.failed(lease, NO_SPREAD, retry=False)
                self._groups_replaced += 1
            else:
                self._ledger.scored(lease)
                self._scored[lease.ticket_id] = ScoredGroup(group, scores.rewards_G, scores.terms_G)
        self._notify()

    async def _scores_of(
        self,
        what: str,
        texts_G: Sequence[str],
        sample: Sample,
        previous: float | None,
        wanted: Callable[[], bool] = lambda: True,
    ) -> GroupScores | ScoringFailed:
        """Rewards of texts by the scorer with the least to do; if it dies, by another one while they are `wanted`."""

        def idlest() -> Member | None:
            return min(self._scorers.ready, key=lambda scorer: scorer.calls, default=None)

        while True:
            scorer = await self._wait_for(what, "a scorer", idlest)
            started_s = time.time()
            try:
                with noting(f"{scorer.name} scored {what}"):
                    scores = await self._scorers.call(
                        scorer, f"score {what}", scorer.worker.score(texts_G, sample, previous)
                    )
            except WorkerDiedError as error:
                if wanted():
                    continue
                return ScoringFailed(f"scorer lost: {error}", retry=True)
            except JudgeUnavailable as error:
                if self._outage is None:
                    log.error("the run stops after this step and can go on from it: %s", error)
                    self._outage = error
                    self.stop()
                return ScoringFailed("judge unavailable", retry=True)
            self._timeline.span(scorer.name, "score", started_s, time.time(), step=self._ledger.version)
            return scores

    # --- training ----------------------------------------------------------------------------------------------------

    async def _learn(self) -> None:
        """Take a batch, train, hand the new weights to every engine, and again."""
        await self._until("the learner", "an engine", lambda: self._engines.ready or None)  # their start is not ours
        ended_s = now_s()
        self._learner_idle.take_share()
        while True:
            started_s = time.time()
            version = self._ledger.version
            async with asyncio.TaskGroup() as waiting:
                probe = waiting.create_task(self._parity_if_due(version))
                batch = await self._until("the learner", "a batch of scored groups", self._ledger.take_batch)
            if batch is None:
                return
            self._timeline.span("learner 0", "wait", started_s, time.time(), step=version)
            groups = [self._scored.pop(ticket_id) for ticket_id in batch.ticket_ids]
            trained = await self._train(groups, batch)
            # Taken before the next weights start more groups: with max_staleness = 0 nothing is in flight here, and a
            # resumed run draws what this one draws.
            state = self.state() if self._checkpoint_is_due() else None
            synced = await self._sync(self._ledger.version)
            values = batch_metrics(groups, now_s() - ended_s) | trained | probe.result() | synced
            ended_s = now_s()
            self._log(values | self._idle_shares())
            if self._completions is not None:
                self._completions.keep(self._ledger.version, groups)
            self._tasks.create_task(self._ask_judges(), name="metrics of the judges")
            self._evaluations.start_if_due(self._ledger.version, self._tasks)
            if self._progress is not None:
                self._progress.advance(reward=values["reward/total"], staleness=values.get("staleness_max", 0.0))
            if state is not None:
                await self._checkpoint(state)

    async def _train(self, groups: Sequence[ScoredGroup], batch: Batch) -> dict[str, float]:
        started_s = time.time()
        metrics = await self._ask_learner(f"train version {batch.version}", self._learner.train(groups, batch.version))
        self._timeline.span("learner 0", "train", started_s, time.time(), step=batch.version)
        oldest_versions = {scored.group.ticket_id: scored.group.oldest_version for scored in groups}
        self._trail.trained(self._ledger.trained(batch), oldest_versions)
        return metrics

    def _checkpoint_is_due(self) -> bool:
        every = self._config.checkpoint_every
        return every > 0 and self._ledger.version % every == 0 and not self._ledger.done

    async def _checkpoint(self, state: RunState) -> None:
        await self._ask_learner(f"save version {state.version}", self._save(state))

    async def _sync(self, version: int) -> dict[str, float]:
        """Publish `version` and wait for the engines that live and are not evaluating."""
        self._notify()
        started_s, began_s = time.time(), now_s()
        update = await self._publish(version)

        def received() -> list[_Slot] | None:
            slots = [slot for slot in self._engines.ready if not slot.evaluating]
            return slots if all(slot.version == version for slot in slots) else None

        slots = await self._wait_for("the sync", f"receipts of version {version}", received)
        self._timeline.span("sync", "sync", started_s, time.time(), step=version)
        return {
            "sync_s": now_s() - began_s,
            "sync_bytes": float(update.num_bytes * len(slots)),
            **receipt_metrics([slot.receipt for slot in slots if slot.receipt is not None]),
        }

    async def _publish(self, version: int) -> WeightUpdate:
        self._update = None  # the store holds one version at a time; an engine that starts now gets the next one
        update = await self._ask_learner(f"publish version {version}", self._learner.publish(version))
        self._update, self._published = update, version
        self._notify()
        return update

    async def _ask_learner(self, what: str, answer: Awaitable[Result]) -> Result:
        with noting(f"the learner was to {what}"), self._watchdog.call("the learner", what), self._learner_idle:
            return await answer

    def _log(self, values: Mapping[str, float]) -> None:
        """One line of metrics for the step that has ended, with the evaluation that has ended meanwhile."""
        tickets = {f"tickets/{state}": float(count) for state, count in self._ledger.counts().items()}
        self._logged = {**values, **tickets, **judge_totals(self._judges.values())}
        if self._config.dynamic_sampling:
            self._logged["groups_replaced"] = self._groups_replaced
            self._groups_replaced = 0
        self._metrics.log(self._ledger.version, self._logged | self._evaluations.take())

    def _idle_shares(self) -> dict[str, float]:
        """Shares of the step in which nothing was asked of the learner, and in which an engine had nothing to write."""
        engines = [slot.idle.take_share() for slot in self._engines.ready]
        engine = {"engine_idle_share": float(np.mean(engines))} if engines else {}
        return {"learner_idle_share": self._learner_idle.take_share()} | engine

    async def _ask_judges(self) -> None:
        """Learn what judging has cost so far. Nobody waits for it."""

        async def ask(scorer: Member) -> None:
            with contextlib.suppress(WorkerDiedError):
                self._judges[scorer.name] = await self._scorers.call(scorer, "tell metrics", scorer.worker.metrics())

        await asyncio.gather(*(ask(scorer) for scorer in self._scorers.ready))

    # --- evaluation --------------------------------------------------------------------------------------------------

    async def _score_heldout(self, text: str, sample: Sample) -> GroupScores | ScoringFailed:
        return await self._scores_of(f"the held-out answer to {sample.sample_id}", [text], sample, None)

    @contextlib.asynccontextmanager
    async def _pinned(self, version: int) -> AsyncIterator[Ask | None]:
        """Asks an engine that keeps `version` inside the body; None when no engine will hold it any more."""

        def holder() -> _Slot | str | None:
            slots = [slot for slot in self._engines.ready if slot.version == version and not slot.updating]
            if slots:
                return min(slots, key=lambda slot: len(slot.leases))
            return "none" if self._published != version else None

        slot = await self._wait_for("the evaluation", f"an engine at version {version}", holder)
        if not isinstance(slot, _Slot):
            yield None
            return
        slot.evaluating = True
        try:
            yield partial(self._generate, slot)
        finally:
            slot.evaluating = False
            self._notify()

    # --- parity ------------------------------------------------------------------------------------------------------

    async def _parity_if_due(self, version: int) -> dict[str, float]:
        """The probe's metric; {} when it is not due, or when no engine is left that holds this version.

        It ends before the learner steps, so that both sides hold `version`.
        """
        if version % self._config.parity_every:
            return {}
        engines = await self._until("the parity probe", "an engine", lambda: self._engines.ready or None)
        asks = {slot.name: partial(self._generate, slot) for slot in engines or () if slot.version == version}
        sample_ids = list(self._samples)
        sample = self._samples[sample_ids[version % len(sample_ids)]]

        async def log_probs(groups: Sequence[RolloutGroup]) -> list[list[FloatArray]]:
            return await self._ask_learner(f"probe version {version}", self._learner.log_probs(groups))

        with noting(f"the parity probe ran at version {version}"):
            return await probe_parity(self._config, sample, version, asks, log_probs)

    # --- waiting -----------------------------------------------------------------------------------------------------

    async def _wait_for(self, who: str, what: str, attempt: Callable[[], Result | None]) -> Result:
        """What `attempt` gives, tried now and after every change."""
        with self._watchdog.waiting(who, what):
            while (result := attempt()) is None:
                await self._changed.wait()
        return result

    async def _until(self, who: str, what: str, attempt: Callable[[], Result | None]) -> Result | None:
        """As `_wait_for`, but None when every ticket has ended or the run is to stop."""
        over = object()
        result = await self._wait_for(who, what, lambda: over if self._ledger.done or self._stopping else attempt())
        return None if result is over else result

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


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
