"""The ledger under every order of events, crashes and resumes included: each ticket ends once, no token is too old,
nothing gets stuck."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sif_ray.loop.ledger import Batch, Lease, Ledger, LedgerError


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def make_ledger(num_prompts: int = 6, clock: Clock | None = None, **changes) -> Ledger:
    plan = {"epochs": 1, "groups_per_step": 2, "max_staleness": 1, "lease_timeout_s": 60.0, "now_s": clock or Clock()}
    return Ledger([f"p{i}" for i in range(num_prompts)], **(plan | changes))


def finish(ledger: Ledger, lease: Lease, oldest_version: int | None = None) -> None:
    assert ledger.generated(lease, lease.version if oldest_version is None else oldest_version)
    assert ledger.scored(lease)


# --- the window ------------------------------------------------------------------------------------------------------


def test_strictly_on_policy_leases_one_batch_per_version():
    ledger = make_ledger(max_staleness=0)
    first = [ledger.lease(0), ledger.lease(0)]
    assert ledger.lease(0) is None
    for lease in first:
        finish(ledger, lease)
    batch = ledger.take_batch()
    assert ledger.lease(0) is None, "an engine at the old version must not start while the step runs"
    ledger.trained(batch)
    assert ledger.lease(0) is None, "an engine that has not received version 1 must not start"
    assert ledger.lease(1) is not None


def test_window_holds_one_more_batch_per_unit_of_staleness():
    for max_staleness in (1, 2, 3):
        ledger = make_ledger(20, max_staleness=max_staleness)
        leases = iter(lambda ledger=ledger: ledger.lease(0), None)
        assert len(list(leases)) == 2 * (max_staleness + 1)


def test_learner_waits_for_a_late_group_instead_of_making_it_too_old():
    ledger = make_ledger(20, max_staleness=1)
    late, *quick = [ledger.lease(0) for _ in range(4)]
    for lease in quick:
        finish(ledger, lease)
    ledger.trained(ledger.take_batch())
    newer = [ledger.lease(1) for _ in range(2)]
    for lease in newer:
        finish(ledger, lease)
    assert ledger.take_batch() is None, "version 1 is the last that may train the late group"
    finish(ledger, late)
    assert late.ticket_id in ledger.take_batch().ticket_ids


def test_tokens_written_by_a_newer_version_give_a_group_more_time():
    ledger = make_ledger(20, max_staleness=1)
    crossing, *quick = [ledger.lease(0) for _ in range(3)]
    for lease in quick:
        finish(ledger, lease)
    ledger.trained(ledger.take_batch())
    finish(ledger, crossing, oldest_version=1)
    finish(ledger, ledger.lease(1))
    finish(ledger, ledger.lease(1))
    finish(ledger, ledger.lease(1))
    ledger.trained(ledger.take_batch())
    ledger.trained(ledger.take_batch())
    assert ledger.version == 3


def test_tokens_older_than_the_lease_are_issued_again():
    ledger = make_ledger(max_staleness=1)
    for lease in (ledger.lease(0), ledger.lease(0)):
        finish(ledger, lease)
    ledger.trained(ledger.take_batch())
    lease = ledger.lease(1)
    assert not ledger.generated(lease, oldest_version=0)
    assert ledger.counts()["reissued/stale"] == 1


# --- leases ----------------------------------------------------------------------------------------------------------


def test_expired_lease_returns_to_pending_and_its_late_result_does_not_count():
    clock = Clock()
    ledger = make_ledger(2, clock, lease_timeout_s=10.0)
    slow = ledger.lease(0)
    clock.now_s = 10.0
    assert ledger.expire() == [slow]
    again = ledger.lease(0)
    assert again.ticket_id == slow.ticket_id and (again.attempt, again.failures) == (1, 1)
    assert not ledger.generated(slow, 0)
    assert not ledger.failed(slow, "engine died")
    finish(ledger, again)


def test_scored_group_has_no_lease_to_lose():
    clock = Clock()
    ledger = make_ledger(2, clock)
    finish(ledger, ledger.lease(0))
    clock.now_s = 1e9
    assert ledger.expire() == []


def test_ticket_that_keeps_failing_is_dropped_with_its_reason():
    ledger = make_ledger(2, max_failures=2)
    for _ in range(2):
        lease = ledger.lease(0)
        assert ledger.failed(lease, "judge: rate limit")
    assert ledger.dropped() == {lease.ticket_id: "judge: rate limit"}
    finish(ledger, ledger.lease(0))
    ledger.trained(ledger.take_batch())
    assert ledger.done and ledger.counts()["dropped"] == 1


def test_lease_that_an_engine_loses_is_no_failure_of_the_ticket():
    ledger = make_ledger(2, max_failures=2)
    for _ in range(5):
        lease = ledger.lease(0)
        assert ledger.returned(lease, "engine lost")
        assert not ledger.returned(lease, "engine lost")
    assert ledger.counts()["pending"] == 2 and ledger.counts()["reissued/engine lost"] == 5
    for _ in range(2):
        ledger.failed(ledger.lease(0), "judge: rate limit")
    assert ledger.dropped() == {lease.ticket_id: "judge: rate limit"}


def test_ticket_without_hope_is_dropped_at_once():
    ledger = make_ledger(2)
    lease = ledger.lease(0)
    ledger.failed(lease, "no reference answer", retry=False)
    assert ledger.dropped() == {lease.ticket_id: "no reference answer"}


# --- plan ------------------------------------------------------------------------------------------------------------


def test_order_is_a_seeded_shuffle_of_every_epoch():
    def order(seed: int) -> list[tuple[int, str]]:
        ledger = make_ledger(8, epochs=2.5, seed=seed, groups_per_step=100)
        return [(lease.epoch, lease.sample_id) for lease in iter(lambda: ledger.lease(0), None)]

    once, other = order(3), order(4)
    assert once == order(3) != other
    prompts = {f"p{i}" for i in range(8)}
    assert {s for e, s in once if e == 0} == {s for e, s in once if e == 1} == prompts
    assert [s for e, s in once if e == 0] != [s for e, s in once if e == 1]
    assert len([s for e, s in once if e == 2]) == 4


def test_step_limit_cuts_the_plan():
    ledger = make_ledger(100, max_steps=3)
    assert (ledger.num_tickets, ledger.num_steps) == (6, 3)


def test_repeated_sample_ids_are_refused():
    with pytest.raises(LedgerError, match="repeat"):
        Ledger(["a", "a"], epochs=1, groups_per_step=1, max_staleness=0, lease_timeout_s=1, now_s=Clock())


def test_state_of_another_plan_is_refused():
    with pytest.raises(LedgerError, match="another plan"):
        make_ledger(7).load_state_dict(make_ledger(6).state_dict())


# --- saving ----------------------------------------------------------------------------------------------------------


def resumed(ledger: Ledger, num_prompts: int = 6, **changes) -> Ledger:
    other = make_ledger(num_prompts, **changes)
    other.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    return other


def test_scored_groups_outlive_the_process_and_what_was_in_flight_is_issued_again():
    ledger = make_ledger(6)
    scored, generated, leased = (ledger.lease(0) for _ in range(3))
    finish(ledger, scored)
    ledger.generated(generated, 0)
    again = resumed(ledger)
    assert again.waiting_tickets() == [scored.ticket_id]
    leases = [again.lease(0) for _ in range(3)]
    assert [lease.ticket_id for lease in leases[:2]] == [generated.ticket_id, leased.ticket_id]
    assert [lease.failures for lease in leases] == [0, 0, 0], "what was thrown away with the process is sampled again"
    finish(again, leases[0])
    assert set(again.take_batch().ticket_ids) == {scored.ticket_id, generated.ticket_id}


def test_scored_group_keeps_its_bound_over_a_resume():
    ledger = make_ledger(20, max_staleness=1)
    for lease in [ledger.lease(0) for _ in range(3)]:
        finish(ledger, lease)
    ledger.trained(ledger.take_batch())
    (late,) = ledger.waiting_tickets()  # of version 0, so the batch of version 1 is the last that may hold it
    again = resumed(ledger, 20, max_staleness=1)
    for lease in [again.lease(1) for _ in range(3)]:
        finish(again, lease)
    assert again.lease(1) is None, "the window counts the group that was saved"
    assert late in again.take_batch().ticket_ids


def test_batch_in_training_is_issued_again():
    ledger = make_ledger(2)
    for lease in [ledger.lease(0) for _ in range(2)]:
        finish(ledger, lease)
    ledger.take_batch()
    again = resumed(ledger, 2)
    assert again.waiting_tickets() == [] and again.counts()["pending"] == 2


def test_failures_before_a_resume_count():
    ledger = make_ledger(2, max_failures=2)
    ledger.failed(ledger.lease(0), "judge failed")
    again = resumed(ledger, 2, max_failures=2)
    again.failed(again.lease(0), "judge failed")
    assert again.dropped() == resumed(again, 2).dropped() == {again.dropped().popitem()[0]: "judge failed"}


def test_saved_groups_that_are_too_old_are_refused():
    ledger = make_ledger(2)
    finish(ledger, ledger.lease(0))
    state = ledger.state_dict() | {"version": 5}
    with pytest.raises(LedgerError, match="no batch after version 5"):
        make_ledger(2).load_state_dict(state)


def test_protocol_violations_are_refused():
    ledger = make_ledger(max_staleness=1)
    leases = [ledger.lease(0) for _ in range(4)]
    with pytest.raises(LedgerError, match="is leased, expected generated"):
        ledger.scored(leases[0])
    for lease in leases:
        finish(ledger, lease)
    batch = ledger.take_batch()
    with pytest.raises(LedgerError, match="still in training"):
        ledger.take_batch()
    ledger.trained(batch)
    with pytest.raises(LedgerError, match="not the one in training"):
        ledger.trained(batch)


# --- every order of events -------------------------------------------------------------------------------------------


@dataclass
class Checkpoint:
    """What was saved, and what was true then."""

    state: dict
    version: int
    trained: Counter[str]
    waiting: dict[str, int]  # ticket id of a scored group that no batch had taken: its oldest token's version


class LedgerMachine(RuleBasedStateMachine):
    """Engines, judges, expiries, weight updates, crashes and resumes in any order, against plain bookkeeping."""

    @initialize(
        num_prompts=st.integers(1, 9),
        epochs=st.sampled_from([1, 1.5, 2]),
        groups_per_step=st.integers(1, 4),
        max_staleness=st.integers(0, 3),
        num_engines=st.integers(1, 3),
        seed=st.integers(0, 5),
    )
    def start(self, num_prompts, epochs, groups_per_step, max_staleness, num_engines, seed):
        self.clock = Clock()
        self.plan = {
            "epochs": epochs,
            "groups_per_step": groups_per_step,
            "max_staleness": max_staleness,
            "seed": seed,
            "lease_timeout_s": 10.0,
            "now_s": self.clock,
        }
        self.prompts = [f"p{i}" for i in range(num_prompts)]
        self.ledger = Ledger(self.prompts, **self.plan)
        self.engines = [0] * num_engines
        self.generating: list[tuple[Lease, int]] = []  # with the oldest token version the engine will report
        self.scoring: list[tuple[Lease, int]] = []
        self.batch: Batch | None = None
        self.oldest: dict[str, int] = {}  # of the groups that count
        self.trained: Counter[str] = Counter()
        self.checkpoints: list[Checkpoint] = []
        self.save()

    def pick(self, data, items: list):
        return items.pop(data.draw(st.integers(0, len(items) - 1)))

    @rule(data=st.data())
    def lease(self, data):
        version = self.engines[data.draw(st.integers(0, len(self.engines) - 1))]
        lease = self.ledger.lease(version)
        if lease is not None:
            newest = max(self.engines)
            self.generating.append((lease, data.draw(st.integers(version, newest))))

    @precondition(lambda self: self.generating)
    @rule(data=st.data(), lies=st.integers(0, 9))
    def generate(self, data, lies):
        lease, oldest = self.pick(data, self.generating)
        if lies == 0 and lease.version > 0:
            assert not self.ledger.generated(lease, lease.version - 1)
        elif self.ledger.generated(lease, oldest):
            self.scoring.append((lease, oldest))

    @precondition(lambda self: self.scoring)
    @rule(data=st.data())
    def score(self, data):
        lease, oldest = self.pick(data, self.scoring)
        if self.ledger.scored(lease):
            self.oldest[lease.ticket_id] = oldest

    @precondition(lambda self: self.generating or self.scoring)
    @rule(data=st.data())
    def fail(self, data):
        lease, _ = self.pick(data, self.generating or self.scoring)
        self.ledger.failed(lease, "broken")

    @precondition(lambda self: self.generating)
    @rule(data=st.data())
    def lose_engine(self, data):
        lease, _ = self.pick(data, self.generating)
        if self.ledger.returned(lease, "engine lost"):
            assert lease.ticket_id not in self.ledger.dropped()

    @precondition(lambda self: self.scoring)
    @rule(data=st.data())
    def find_no_spread(self, data):
        lease, _ = self.pick(data, self.scoring)
        if self.ledger.failed(lease, "no reward spread", retry=False):
            assert self.ledger.dropped()[lease.ticket_id] == "no reward spread"

    @rule(seconds=st.sampled_from([1.0, 6.0, 20.0]))
    def time_passes(self, seconds):
        self.clock.now_s += seconds
        self.ledger.expire()

    @precondition(lambda self: self.batch is None)
    @rule()
    def take(self):
        self.batch = self.ledger.take_batch()
        if self.batch is not None:
            for ticket_id in self.batch.ticket_ids:
                assert self.ledger.version - self.oldest.pop(ticket_id) <= self.plan["max_staleness"]

    @precondition(lambda self: self.batch is not None)
    @rule()
    def train(self):
        self.ledger.trained(self.batch)
        self.trained.update(self.batch.ticket_ids)
        self.batch = None

    @rule(groups=st.integers(1, 6), train=st.booleans())
    def work_calmly(self, groups, train):
        """Several groups at once, up to a training step: single events alone seldom get far."""
        for _ in range(groups):
            lease = self.ledger.lease(max(self.engines))
            if lease is not None and self.ledger.generated(lease, lease.version) and self.ledger.scored(lease):
                self.oldest[lease.ticket_id] = lease.version
        if train and self.batch is None:
            self.take()
        if train and self.batch is not None:
            self.train()
            self.engines = [self.ledger.version] * len(self.engines)

    @rule(data=st.data())
    def update_engine(self, data):
        self.engines[data.draw(st.integers(0, len(self.engines) - 1))] = self.ledger.version

    @rule()
    def save(self):
        self.checkpoints.append(
            Checkpoint(
                state=json.loads(json.dumps(self.ledger.state_dict())),
                version=self.ledger.version,
                trained=self.trained.copy(),
                waiting={ticket_id: self.oldest[ticket_id] for ticket_id in self.ledger.waiting_tickets()},
            )
        )

    @rule(data=st.data())
    def crash_and_resume(self, data):
        """From any checkpoint so far; what was done after it is undone, and later checkpoints are gone."""
        del self.checkpoints[data.draw(st.integers(1, len(self.checkpoints))) :]
        saved = self.checkpoints[-1]
        self.clock.now_s = 0.0  # another machine's clock
        self.ledger = Ledger(self.prompts, **self.plan)
        self.ledger.load_state_dict(saved.state)
        assert json.loads(json.dumps(self.ledger.state_dict())) == saved.state
        self.engines = [saved.version] * len(self.engines)
        self.generating, self.scoring, self.batch = [], [], None
        self.trained, self.oldest = saved.trained.copy(), dict(saved.waiting)
        assert set(self.ledger.waiting_tickets()) == saved.waiting.keys()

    @invariant()
    def every_ticket_is_somewhere_once(self):
        counts = self.ledger.counts()
        assert sum(count for state, count in counts.items() if "/" not in state) == self.ledger.num_tickets
        assert counts["trained"] == len(self.trained) and set(self.trained.values()) <= {1}
        assert not set(self.trained) & set(self.ledger.dropped())

    def teardown(self):
        """Whatever has happened, working on calmly finishes the run."""
        if not hasattr(self, "ledger"):
            return
        shuffle = random.Random(0).shuffle
        for _ in range(10 * self.ledger.num_tickets + 10):
            if self.ledger.done:
                break
            if self.batch is not None:
                self.train()
            self.engines = [self.ledger.version] * len(self.engines)
            while (lease := self.ledger.lease(self.ledger.version)) is not None:
                self.generating.append((lease, lease.version))
            shuffle(self.generating)
            while self.generating:
                lease, oldest = self.generating.pop()
                if self.ledger.generated(lease, oldest):
                    self.scoring.append((lease, oldest))
            while self.scoring:
                lease, oldest = self.scoring.pop()
                if self.ledger.scored(lease):
                    self.oldest[lease.ticket_id] = oldest
            self.take()
            assert self.batch is not None or self.ledger.done, f"stuck: {self.ledger.counts()}"
        assert self.ledger.done
        assert len(self.trained) + len(self.ledger.dropped()) == round(self.plan["epochs"] * len(self.prompts))


TestEveryOrder = LedgerMachine.TestCase
TestEveryOrder.settings = settings(
    max_examples=250, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
