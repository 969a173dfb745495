"""A GRPO run on a virtual clock: the rules of `sif_ray.loop.grpo` around the real ledger.

    dispatch ─lease─► Engine (decode steps) ─group─► Scorers (judge) ─scored─► ledger ─batch─► learner ─► publish
        ▲                                                                                                   │
        └────────── the engine leases at the new version: transfer (it goes on writing), pause ◄────────────┘

An event is a time and what happens then; between two events nothing changes. Everything that is drawn (lengths,
latencies, failures) comes from the scenario's seed, so equal scenarios have equal outcomes.

Left out: evaluation, parity probes, the budget of restarts (a place is always filled again), and whatever a network or
a machine does to several transfers at once.
"""

from __future__ import annotations

import contextlib
import gc
import heapq
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from sif_ray.loop.ledger import Batch, Lease, Ledger
from sif_ray.plan.engine import Engine, Group
from sif_ray.plan.judging import Outages, Scorers
from sif_ray.plan.scenario import Scenario

LENGTHS_DRAWN = 1024  # groups at a time
MAX_FAILURES = 100_000  # more is a run that would never end

_Scored = tuple[int, int]  # version of a group's oldest token, its tokens


class SimulationError(RuntimeError):
    """The simulated run does not get on; the message says why."""


@dataclass(frozen=True)
class Step:
    """One training step as it came about; of a step that was undone, how it came about the last time."""

    end_s: float  # when every engine had its weights
    seconds: float  # since the step before it ended
    tokens: int  # of its completions
    staleness: Counter[int]  # its groups by the number of versions between the learner and their oldest token


@dataclass(frozen=True)
class _Trained:
    """What a step trained, until its weights are everywhere."""

    tokens: int
    staleness: Counter[int]
    state: tuple[dict[str, Any], dict[str, _Scored]] | None  # to be saved, where a learner may die


@dataclass(frozen=True)
class Outcome:
    """What a simulated run came to. It begins when engines and learner are up."""

    scenario: Scenario
    seconds: float
    steps: list[Step]
    learner_busy: float  # shares in [0, 1] of the run: training, publishing, saving
    learner_trains: float  # the first part of that
    learner_waits: float  # for a batch of scored groups; what remains is for engines to receive, and restarts
    engines_busy: float  # with a sequence to write
    scorers_busy: float  # with a group to score
    judge_busy: float  # of the calls that may be in flight
    tokens_written: float
    tickets: dict[str, int]  # `Ledger.counts` at the end
    engine_deaths: int
    learner_deaths: int
    steps_undone: int


def simulate(scenario: Scenario) -> Outcome:
    """Run the scenario to its last step. Raises `SimulationError` for one that does not get there."""
    with _without_collector():
        return Simulation(scenario).run()


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """A third of the time would go into Python's search for cycles among the tickets; a simulation makes none."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class _Course(Enum):
    """Where a place is: its engine starts, waits for a version, takes one over, leases."""

    STARTING = 0
    STARTED = 1
    UPDATING = 2
    READY = 3


class _Place(Engine):
    """An engine and what the loop knows about it."""

    def __init__(self, number: int, scenario: Scenario) -> None:
        super().__init__(scenario.rates.decode_step_s, scenario.max_num_seqs, scenario.rates.prefill_s)
        self.number = number
        self.course = _Course.READY
        self.joined = True  # has been at a published version since it started: a sync waits for it
        self.leases: dict[int, Lease] = {}  # by identity: a lease's own hash is of all its fields
        self.life = 0  # grows with every death: events of an earlier life are void
        self.plan = 0  # of its next event: earlier ones are void


class Simulation:
    """One run. An event is (time, number, what happens, with what)."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._rates = scenario.rates
        self._now_s = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._num_events = 0
        self._ledger = self._make_ledger()
        self._places = [_Place(number, scenario) for number in range(scenario.num_engines)]
        self._room: dict[int, list[tuple[int, int]]] = {}  # by version: heap of (leases, place), outdated ones too
        self._shut: set[int] = set()  # versions for which the window is full, until something opens it
        self._changed: set[int] = set()  # places whose next event is to be worked out again
        self._scored: dict[str, _Scored] = {}  # by ticket
        self._saved: tuple[dict[str, Any], dict[str, _Scored]] | None = None  # the newest checkpoint
        self._life = 0  # of the run: what an earlier one began is void
        self._learner_waits = True
        self._published = 0
        self._update_is_there = True  # not while the next is published
        self._syncing = False
        self._synced: _Trained | None = None  # the step whose weights go round
        self._to_receive = 0  # engines that a sync waits for
        self._saves = False  # a checkpoint follows the sync
        self._slowdown = 1.0  # of decode steps, now
        self._steps: list[Step] = []
        self._step_began_s = 0.0
        self._learner_busy_s = self._learner_trains_s = 0.0
        self._learner_waits_s = self._waits_since_s = 0.0
        self._engine_deaths = self._learner_deaths = self._steps_undone = 0
        self._lengths_rng, judge_rng = (np.random.default_rng([scenario.seed, kind]) for kind in (0, 1))
        self._lengths: list[list[int]] = []
        self._failures = random.Random(f"{scenario.seed}/failures")
        breaks = scenario.failures
        outages = Outages(breaks.judge_outage_every_h, breaks.judge_outage_s, random.Random(f"{scenario.seed}/judge"))
        self._scorers = Scorers(scenario, judge_rng, outages)

    def run(self) -> Outcome:
        """To the end of the last step."""
        for place in self._places:
            self._offer(place)
        self._dispatch()
        self._after(self._scenario.lease_timeout_s / 10, self._expire)
        self._plan_failure()
        while not (self._learner_waits and self._ledger.done):
            self._now_s, _, action, arguments = heapq.heappop(self._events)
            action(*arguments)
        return self._outcome()

    def _make_ledger(self) -> Ledger:
        scenario = self._scenario
        return Ledger(
            [f"p{index}" for index in range(scenario.num_steps * scenario.groups_per_step)],
            epochs=1,
            groups_per_step=scenario.groups_per_step,
            max_staleness=scenario.max_staleness,
            lease_timeout_s=scenario.lease_timeout_s,
            now_s=lambda: self._now_s,
            seed=scenario.seed,
        )

    def _after(self, seconds: float, action: Callable[..., None], *arguments: Any) -> None:
        self._at(self._now_s + seconds, action, *arguments)

    def _at(self, time_s: float, action: Callable[..., None], *arguments: Any) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (time_s, self._num_events, action, arguments))

    def _in_this_life(self, seconds: float, action: Callable[..., None], *arguments: Any) -> None:
        """As `_after`, unless the run starts again before."""
        life = self._life

        def act() -> None:
            if life == self._life:
                action(*arguments)

        self._after(seconds, act)

    # --- rollouts ----------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Lease while the window allows, to the engine with the fewest leases first; then see when engines are done."""
        while offers := [
            (self._room[version][0], version)
            for version in list(self._room)
            if version not in self._shut and self._has_room(version)
        ]:
            (_, number), version = min(offers)
            lease = self._ledger.lease(version)
            if lease is None:
                self._shut.add(version)
                continue
            heapq.heappop(self._room[version])
            self._begin(self._places[number], lease)
        for number in sorted(self._changed):
            self._plan_next(self._places[number])
        self._changed.clear()

    def _has_room(self, version: int) -> bool:
        """Whether an engine of this version may take a lease; drops what is outdated from the top of the heap."""
        offers = self._room[version]
        while offers:
            leases, number = offers[0]
            place = self._places[number]
            if place.course is _Course.READY and place.version == version and len(place.leases) == leases:
                return True
            heapq.heappop(offers)
        del self._room[version]
        return False

    def _offer(self, place: _Place) -> None:
        if place.course is _Course.READY and len(place.leases) < self._scenario.groups_per_engine:
            heapq.heappush(self._room.setdefault(place.version, []), (len(place.leases), place.number))

    def _begin(self, place: _Place, lease: Lease) -> None:
        if not self._lengths:
            sample = self._scenario.lengths.sample
            self._lengths = sample(self._lengths_rng, LENGTHS_DRAWN, self._scenario.group_size)
        place.leases[id(lease)] = lease
        self._offer(place)
        if self._rates.request_s:
            self._after(self._rates.request_s, self._arrive, place, place.life, lease, self._lengths.pop())
        else:
            self._add(place, lease, self._lengths.pop())

    def _arrive(self, place: _Place, life: int, lease: Lease, lengths: Sequence[int]) -> None:
        if life == place.life:
            self._add(place, lease, lengths)
            self._dispatch()

    def _add(self, place: _Place, lease: Lease, lengths: Sequence[int]) -> None:
        self._advance(place)
        place.add(Group(lease, lengths), self._now_s)
        self._changed.add(place.number)

    def _advance(self, place: _Place) -> None:
        """Bring an engine to now. What has ended leaves it."""
        for group in place.advance(self._now_s):
            self._generated(place, group)

    def _plan_next(self, place: _Place) -> None:
        place.plan += 1
        next_s = place.next_s()
        if next_s < math.inf:
            self._at(next_s, self._go_on, place, place.plan)

    def _go_on(self, place: _Place, plan: int) -> None:
        if plan == place.plan:
            self._changed.add(place.number)
            self._advance(place)
            self._dispatch()

    def _generated(self, place: _Place, group: Group) -> None:
        lease: Lease = group.key
        place.leases.pop(id(lease), None)
        self._offer(place)
        if group.version > lease.version:
            self._shut.clear()
        if self._ledger.generated(lease, group.version):
            end_s, worker = self._scorers.score(len(group.lengths), self._now_s)
            tokens = sum(group.lengths)
            self._at(end_s, self._answered, self._life, worker, lease, group.version, tokens)

    def _answered(self, life: int, worker: int, lease: Lease, oldest: int, tokens: int) -> None:
        if life != self._life:
            return
        self._scorers.done(worker, self._now_s)
        if self._ledger.scored(lease):
            self._scored[lease.ticket_id] = (oldest, tokens)
        self._learn()

    def _expire(self) -> None:
        """Take back the leases that nobody has answered in time."""
        if self._ledger.expire():
            self._shut.clear()
            self._dispatch()
            self._learn()
        self._after(self._scenario.lease_timeout_s / 10, self._expire)

    # --- training ----------------------------------------------------------------------------------------------------

    def _learn(self) -> None:
        batch = self._ledger.take_batch() if self._learner_waits else None
        if batch is None:
            return
        self._shut.clear()
        self._learner_waits = False
        self._learner_waits_s += self._now_s - self._waits_since_s
        groups = [self._scored.pop(ticket_id) for ticket_id in batch.ticket_ids]
        costs = [self._scenario.prompt_tokens + tokens for _, tokens in groups]
        seconds = self._rates.learner.seconds(costs, self._scenario.learner_ranks)
        self._set_slowdown(self._rates.decode_slowdown)
        self._ask_learner(seconds, self._trained, batch, groups, seconds)
        self._dispatch()

    def _ask_learner(self, seconds: float, then: Callable[..., None], *arguments: Any) -> None:
        """Keep the learner busy."""

        def end() -> None:
            self._learner_busy_s += seconds
            then(*arguments)

        self._in_this_life(seconds, end)

    def _trained(self, batch: Batch, groups: list[_Scored], seconds: float) -> None:
        self._set_slowdown(1.0)
        self._learner_trains_s += seconds
        version = self._ledger.trained(batch)
        self._shut.clear()
        staleness = Counter(batch.version - oldest for oldest, _ in groups)
        self._saves = self._is_checkpoint(version)
        state = (self._ledger.state_dict(), dict(self._scored)) if self._saves and self._can_die else None
        self._publish(version, _Trained(sum(tokens for _, tokens in groups), staleness, state))
        self._dispatch()

    @property
    def _can_die(self) -> bool:
        return self._scenario.failures.gpu_mtbf_h > 0

    def _is_checkpoint(self, version: int) -> bool:
        every = self._scenario.checkpoint_every
        return every > 0 and version % every == 0 and not self._ledger.done

    def _publish(self, version: int, step: _Trained | None) -> None:
        self._update_is_there = False
        self._ask_learner(self._rates.publish_s, self._sync, version, step)

    def _sync(self, version: int, step: _Trained | None) -> None:
        """Bring the version to every engine; the step ends when those that had joined have it."""
        self._published, self._update_is_there = version, True
        self._syncing, self._synced = True, step
        joined = [place for place in self._places if place.joined]
        self._to_receive = len(joined)
        self._bring(joined)
        self._bring([place for place in self._places if place.course is _Course.STARTED])
        self._end_sync_if_received()

    def _bring(self, places: list[_Place]) -> None:
        """Send the published version; places that get it at the same time share their events."""
        if not places:
            return
        for place in places:
            place.course = _Course.UPDATING
        lives = [(place, place.life) for place in places]
        if self._rates.transfer_in_turn:
            for turn, one in enumerate(lives, 1):
                self._after(turn * self._rates.transfer_s, self._pause, [one], self._published)
        else:
            self._after(self._rates.transfer_s, self._pause, lives, self._published)

    def _pause(self, lives: list[tuple[_Place, int]], version: int) -> None:
        for place, life in lives:
            if life == place.life:
                self._advance(place)
                place.stand_still(self._rates.pause_s)
                self._changed.add(place.number)
        self._after(self._rates.pause_s, self._received, lives, version)
        self._dispatch()

    def _received(self, lives: list[tuple[_Place, int]], version: int) -> None:
        for place, life in lives:
            if life != place.life:
                continue
            if place.has_waiting:  # what begins before now is of the old version
                self._advance(place)
                self._changed.add(place.number)
            place.version = version
            self._shut.discard(version)
            self._to_receive -= place.joined and version == self._published
            self._join(place)
        self._end_sync_if_received()
        self._dispatch()

    def _join(self, place: _Place) -> None:
        """The engine leases, or takes a newer version first."""
        if place.version == self._published:
            place.course, place.joined = _Course.READY, True
            self._offer(place)
        else:
            place.course = _Course.STARTED
            if self._update_is_there:
                self._bring([place])

    def _end_sync_if_received(self) -> None:
        if not self._syncing or self._to_receive:
            return
        self._syncing = False
        step, self._synced = self._synced, None
        if step is None:  # a run that starts again publishes what it has
            self._learner_is_free()
            return
        self._steps.append(Step(self._now_s, self._now_s - self._step_began_s, step.tokens, step.staleness))
        self._step_began_s = self._now_s
        if self._saves:
            self._ask_learner(self._rates.checkpoint_s, self._save, step.state)
        else:
            self._learner_is_free()

    def _save(self, state: Any) -> None:
        self._saved = state
        self._learner_is_free()

    def _learner_is_free(self) -> None:
        self._learner_waits, self._waits_since_s = True, self._now_s
        self._learn()

    def _set_slowdown(self, factor: float) -> None:
        if factor == self._slowdown:
            return
        self._slowdown = factor
        for place in self._places:
            if place.course is not _Course.STARTING:
                self._advance(place)
                place.slowdown = factor
                self._changed.add(place.number)

    # --- failures ----------------------------------------------------------------------------------------------------

    def _plan_failure(self) -> None:
        if self._can_die:
            every_s = self._scenario.failures.gpu_mtbf_h * 3600 / self._scenario.num_gpus
            self._after(self._failures.expovariate(1 / every_s), self._fail)

    def _fail(self) -> None:
        """A GPU fails, and with it the engine or the learner that it belongs to."""
        scenario = self._scenario
        gpu = self._failures.randrange(scenario.num_gpus)
        if gpu < scenario.learner_ranks:
            self._restart()
        else:
            place = self._places[(gpu - scenario.learner_ranks) // scenario.gpus_per_engine]
            if place.course is not _Course.STARTING:
                self._engine_deaths += 1
                self._lose(place)
                self._end_sync_if_received()
                self._dispatch()
        if self._engine_deaths + self._learner_deaths > MAX_FAILURES:
            raise SimulationError(
                f"after {MAX_FAILURES} failures the run has done {len(self._steps)} of {scenario.num_steps} steps; "
                "save more often (checkpoint_every) or take fewer GPUs"
            )
        self._plan_failure()

    def _lose(self, place: _Place) -> None:
        """An engine dies; its leases return at once and its successor starts."""
        if place.course is not _Course.STARTING:
            self._advance(place)
        if place.joined and place.course is _Course.UPDATING and self._syncing:
            self._to_receive -= 1
        for lease in place.leases.values():
            self._ledger.returned(lease, "engine lost")
        place.leases.clear()
        self._shut.clear()
        place.lose_all()
        place.life += 1
        place.plan += 1
        place.course, place.joined, place.slowdown, place.version = _Course.STARTING, False, 1.0, 0
        self._after(self._rates.engine_start_s, self._started, place, place.life)

    def _started(self, place: _Place, life: int) -> None:
        if life != place.life:
            return
        place.advance(self._now_s)
        place.slowdown = self._slowdown
        self._join(place)
        self._dispatch()

    def _restart(self) -> None:
        """The learner dies: everything starts again from the newest checkpoint (`sif_ray.loop.stage`)."""
        self._learner_deaths += 1
        self._life += 1
        self._scorers.reset(self._now_s)
        self._ledger = self._make_ledger()
        state, scored = self._saved or (None, {})
        if state is not None:
            self._ledger.load_state_dict(state)
        self._scored = dict(scored)
        self._steps_undone += len(self._steps) - self._ledger.version
        del self._steps[self._ledger.version :]
        if self._learner_waits:
            self._learner_waits_s += self._now_s - self._waits_since_s
        self._learner_waits = self._syncing = False
        self._synced = None
        self._slowdown = 1.0
        self._room.clear()
        self._published, self._update_is_there = self._ledger.version, self._ledger.version == 0
        for place in self._places:
            place.leases.clear()
            self._lose(place)
        version = self._ledger.version
        if version:
            self._in_this_life(self._rates.learner_start_s, self._publish, version, None)
        else:
            self._in_this_life(self._rates.learner_start_s, self._learner_is_free)

    def _outcome(self) -> Outcome:
        for place in self._places:
            self._advance(place)
        self._scorers.reset(self._now_s)
        seconds, scenario = max(self._now_s, 1e-9), self._scenario
        return Outcome(
            scenario,
            self._now_s,
            self._steps,
            learner_busy=self._learner_busy_s / seconds,
            learner_trains=self._learner_trains_s / seconds,
            learner_waits=self._learner_waits_s / seconds,
            engines_busy=sum(place.busy_s for place in self._places) / seconds / scenario.num_engines,
            scorers_busy=self._scorers.busy_s / seconds / scenario.num_reward_workers,
            judge_busy=self._scorers.calls_s / seconds / scenario.judge_calls,
            tokens_written=sum(place.tokens for place in self._places),
            tickets=self._ledger.counts(),
            engine_deaths=self._engine_deaths,
            learner_deaths=self._learner_deaths,
            steps_undone=self._steps_undone,
        )
