"""The ledger: which prompt is where, and which may start next.

One ticket per prompt and epoch goes through

    pending -> leased -> generated -> scored -> trained
       ^_________|___________|                 (failed, expired or too old: issued again)
                                     dropped   (failed too often)

and the ledger is the only owner of that state. It does no I/O and reads time only through the clock it is given.

Staleness of a group in a training step is `learner version - oldest token version`. A group whose oldest token is of
version v is *due* at version v + max_staleness: the batch taken at that version is the last one that may hold it. One
batch of `groups_per_step` groups is taken per version, so the bound is a matter of scheduling, and four sentences
keep it:

1. A lease is given only if, for every version d, the live groups due by d still fit into the batches up to d.
2. A batch takes the scored groups due first, and only if sentence 1 holds for the groups it leaves behind;
   otherwise the learner waits for the late group instead of throwing it away (long completions are not punished).
3. A result counts only under the lease that asked for it, so a lease that expired cannot train a prompt twice.
4. `trained` and `dropped` are final, and every ticket reaches one of them.

A saved ledger keeps the scored groups and when they are due; what was in flight is issued again. The groups it keeps
are a part of those that were live, so sentence 1 holds for them at the version at which it was saved, and the bound is
the same before and after a resume.

There is no deadlock: when every live group is scored, sentence 2 always allows a batch, and with fewer live groups
than a batch, sentence 1 always allows a lease to an engine at the learner's version.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class LedgerError(RuntimeError):
    """A transition that the protocol excludes, or a saved state that belongs to another run."""


class State(StrEnum):
    """Where a ticket is."""

    PENDING = "pending"
    LEASED = "leased"
    GENERATED = "generated"
    SCORED = "scored"
    TRAINED = "trained"
    DROPPED = "dropped"


_ENDS = (State.TRAINED, State.DROPPED)


@dataclass(frozen=True)
class Lease:
    """The right to generate one group, until `expires_s` on the ledger's clock.

    Example: `Lease(ticket_id="1/toy-7", sample_id="toy-7", epoch=1, attempt=0, failures=0, version=12, expires_s=9.5)`.
    """

    ticket_id: str
    sample_id: str
    epoch: int  # 0-based
    attempt: int  # 0 for the first lease of the ticket in this process
    failures: int  # of the ticket before; rollouts are sampled anew after each
    version: int  # policy version of the engine when the lease was given
    expires_s: float


@dataclass(frozen=True)
class Batch:
    """The tickets of one training step, taken at learner version `version`."""

    version: int
    ticket_ids: tuple[str, ...]


@dataclass(slots=True)
class _Ticket:
    order: int  # place in the plan
    ticket_id: str
    sample_id: str
    epoch: int
    state: State = State.PENDING
    attempts: int = 0  # leases given so far by this process
    failures: int = 0
    lease: Lease | None = None
    due: int = -1  # last learner version that may train the group; -1 when not live


class Ledger:
    """Exactly-once bookkeeping of prompts under a hard bound on staleness. See the module's docstring.

    Example:
        >>> plan = {"epochs": 1, "groups_per_step": 2, "max_staleness": 0}
        >>> ledger = Ledger(["a", "b"], **plan, lease_timeout_s=60, now_s=time.monotonic)
        >>> lease = ledger.lease(engine_version=0)
        >>> ledger.generated(lease, oldest_version=0), ledger.scored(lease)
        (True, True)
    """

    def __init__(
        self,
        sample_ids: Sequence[str],
        *,
        epochs: float,
        groups_per_step: int,
        max_staleness: int,
        lease_timeout_s: float,
        now_s: Callable[[], float],
        seed: int = 0,
        max_steps: int = 0,
        max_failures: int = 3,
    ) -> None:
        """Plan `epochs` seeded shuffles of the prompts, cut to `max_steps` batches (0 = no limit).

        `max_failures` is the number of failed or expired leases after which a ticket is dropped.
        """
        limit = max_steps * groups_per_step if max_steps else None
        self._tickets = list(_plan(sample_ids, epochs, seed, limit))
        self._by_id = {ticket.ticket_id: ticket for ticket in self._tickets}
        if len(self._by_id) != len(self._tickets):
            raise LedgerError(f"sample ids repeat: {len(sample_ids)} given, {len(set(sample_ids))} distinct")
        self.groups_per_step = groups_per_step
        self.max_staleness = max_staleness
        self.version = 0  # of the learner: number of training steps done
        self._lease_timeout_s = lease_timeout_s
        self._max_failures = max_failures
        self._now_s = now_s
        self._pending = [ticket.order for ticket in self._tickets]  # a heap; ascending order is one
        self._expiries: list[tuple[float, int, int]] = []  # heap of (expires_s, order, attempt); outdated entries stay
        self._ready: list[tuple[int, int]] = []  # heap of (due, order) of scored groups not taken yet
        self._ready_by_due: Counter[int] = Counter()
        self._live_by_due: Counter[int] = Counter()  # leased, generated and scored groups, not taken
        # What `state_dict` needs, kept up to date: it must not cost a walk over all tickets.
        self._failed: set[int] = set()  # orders of tickets that have failed and have not ended
        self._is_trained = bytearray(len(self._tickets))  # 1 = trained, by order
        self._drop_reasons: dict[str, str] = {}
        self._digest = ""
        self._counts = Counter({State.PENDING: len(self._tickets)})
        self._reissued: Counter[str] = Counter()
        self._taken: Batch | None = None

    # --- what there is ---

    @property
    def num_tickets(self) -> int:
        """Prompts times epochs, after the cut to `max_steps`."""
        return len(self._tickets)

    @property
    def num_steps(self) -> int:
        """Training steps of the whole plan when nothing is dropped."""
        return -(-len(self._tickets) // self.groups_per_step)

    @property
    def done(self) -> bool:
        """True when every ticket is trained or dropped."""
        return self._counts[State.TRAINED] + self._counts[State.DROPPED] == len(self._tickets)

    def counts(self) -> dict[str, int]:
        """Tickets per state, and how often tickets were issued again as "reissued/<reason>"."""
        states = {state.value: self._counts[state] for state in State}
        return states | {f"reissued/{reason}": count for reason, count in sorted(self._reissued.items())}

    def dropped(self) -> dict[str, str]:
        """{ticket id: reason} of the tickets that were given up."""
        return dict(self._drop_reasons)

    def waiting_tickets(self) -> list[str]:
        """Tickets whose groups are scored and in no batch yet, due first."""
        return [self._tickets[order].ticket_id for _, order in sorted(self._ready)]

    # --- rollouts ---

    def lease(self, engine_version: int) -> Lease | None:
        """The next prompt for an engine that holds `engine_version`; None while there is none or the window is full."""
        if not self._pending or not self._fits(engine_version + self.max_staleness):
            return None
        ticket = self._tickets[heapq.heappop(self._pending)]
        lease = Lease(
            ticket_id=ticket.ticket_id,
            sample_id=ticket.sample_id,
            epoch=ticket.epoch,
            attempt=ticket.attempts,
            failures=ticket.failures,
            version=engine_version,
            expires_s=self._now_s() + self._lease_timeout_s,
        )
        ticket.attempts += 1
        ticket.lease = lease
        self._move(ticket, State.LEASED)
        self._set_due(ticket, engine_version + self.max_staleness)
        heapq.heappush(self._expiries, (lease.expires_s, ticket.order, lease.attempt))
        return lease

    def generated(self, lease: Lease, oldest_version: int) -> bool:
        """Record the group of a lease; False when it does not count (expired lease, or tokens older than the lease)."""
        ticket = self._holder(lease, State.LEASED)
        if ticket is None:
            return False
        if oldest_version < lease.version:
            self._give_back(ticket, "stale")
            return False
        self._move(ticket, State.GENERATED)
        self._set_due(ticket, oldest_version + self.max_staleness)
        return True

    def scored(self, lease: Lease) -> bool:
        """Record that the rewards of a lease's group are known; False when the lease has expired."""
        ticket = self._holder(lease, State.GENERATED)
        if ticket is None:
            return False
        ticket.lease = None
        self._move(ticket, State.SCORED)
        self._make_ready(ticket)
        return True

    def holds(self, lease: Lease) -> bool:
        """True while a result under this lease would count."""
        return self._by_id[lease.ticket_id].lease == lease

    def failed(self, lease: Lease, reason: str, *, retry: bool = True) -> bool:
        """Issue the ticket again, or drop it: without `retry` or after `max_failures`. False for an expired lease."""
        ticket = self._holder(lease, State.LEASED, State.GENERATED)
        if ticket is None:
            return False
        self._give_back(ticket, reason, retry)
        return True

    def returned(self, lease: Lease, reason: str) -> bool:
        """Issue the ticket again without a failure on its account: who held the lease is gone. False for an expired
        lease."""
        ticket = self._holder(lease, State.LEASED)
        if ticket is None:
            return False
        self._give_back(ticket, reason, blamed=False)
        return True

    def expire(self) -> list[Lease]:
        """Take back every lease whose time is over and return them."""
        expired: list[Lease] = []
        while self._expiries and self._expiries[0][0] <= self._now_s():
            _, order, attempt = heapq.heappop(self._expiries)
            ticket = self._tickets[order]
            if ticket.lease is not None and ticket.lease.attempt == attempt:
                expired.append(ticket.lease)
                self._give_back(ticket, "lease expired")
        return expired

    # --- training ---

    def take_batch(self) -> Batch | None:
        """The groups of the next training step, due first; None while the learner has to wait.

        The batch holds `groups_per_step` groups; only the last one of a run may hold fewer. Raises `LedgerError`
        when a batch is out already, or if a group were older than the bound.
        """
        if self._taken is not None:
            raise LedgerError(f"the batch of version {self._taken.version} is still in training; call trained() first")
        size = min(self.groups_per_step, len(self._ready))
        if size == 0 or (size < self.groups_per_step and not self._only_scored_left()):
            return None
        if not _schedulable(self._left_by_due(size), self.version + 1, self.groups_per_step):
            return None
        chosen = [heapq.heappop(self._ready) for _ in range(size)]
        if chosen[0][0] < self.version:
            late = self._tickets[chosen[0][1]].ticket_id
            raise LedgerError(f"ticket {late} was due at version {chosen[0][0]}, the learner is at {self.version}")
        for due, order in chosen:
            self._set_due(self._tickets[order], None)
            self._ready_by_due[due] -= 1
        self._ready_by_due = +self._ready_by_due  # without those of which none is left
        self._taken = Batch(self.version, tuple(self._tickets[order].ticket_id for _, order in chosen))
        return self._taken

    def trained(self, batch: Batch) -> int:
        """Close the tickets of the batch that is out; returns the learner's new version."""
        if batch != self._taken:
            raise LedgerError(f"the batch of version {batch.version} is not the one in training")
        for ticket_id in batch.ticket_ids:
            self._move(self._by_id[ticket_id], State.TRAINED)
        self._taken = None
        self.version += 1
        return self.version

    # --- saving ---

    def state_dict(self) -> dict[str, Any]:
        """Everything that outlives the process, ready for JSON.

        Scored groups that no batch holds are saved as scored (`waiting_tickets`): the caller saves the groups
        themselves. What is in flight, a batch in training included, is saved as pending.
        """
        failed = [self._tickets[order] for order in sorted(self._failed)]
        return {
            "plan": self._plan_digest(),
            "version": self.version,
            "trained": _ranges(self._is_trained),
            "dropped": self.dropped(),
            "scored": {ticket_id: self._by_id[ticket_id].due for ticket_id in self.waiting_tickets()},
            "failures": {ticket.ticket_id: ticket.failures for ticket in failed},
            "reissued": dict(self._reissued),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`: finished tickets stay finished, scored groups wait for a batch under their old
        bound, everything else is pending.

        Only a fresh ledger of the same plan may load; raises `LedgerError` otherwise.
        """
        if self._counts[State.PENDING] != len(self._tickets) or self.version:
            raise LedgerError("a ledger that has started cannot load a state; make a new one")
        if state["plan"] != self._plan_digest():
            raise LedgerError("the saved ledger has another plan: use the same prompts, epochs, seed and max_steps")
        self.version = state["version"]
        self._reissued = Counter(state["reissued"])
        for first, last in state["trained"]:
            for order in range(first, last + 1):
                self._move(self._tickets[order], State.TRAINED)
        for ticket_id, reason in state["dropped"].items():
            self._drop(self._by_id[ticket_id], reason)
        for ticket_id, due in state["scored"].items():
            self._move(self._by_id[ticket_id], State.SCORED)
            self._set_due(self._by_id[ticket_id], due)
            self._make_ready(self._by_id[ticket_id])
        if not _schedulable(self._live_by_due, self.version, self.groups_per_step):
            raise LedgerError(f"the saved ledger has scored groups that no batch after version {self.version} can hold")
        for ticket_id, failures in state["failures"].items():
            self._blame(self._by_id[ticket_id], failures)
        self._pending = [ticket.order for ticket in self._tickets if ticket.state is State.PENDING]

    # --- inside ---

    def _holder(self, lease: Lease, *states: State) -> _Ticket | None:
        ticket = self._by_id[lease.ticket_id]
        if ticket.lease is not lease and ticket.lease != lease:  # comparing fields takes longer than all the rest
            return None
        if ticket.state not in states:
            raise LedgerError(f"ticket {lease.ticket_id} is {ticket.state}, expected {' or '.join(states)}")
        return ticket

    def _fits(self, due: int) -> bool:
        with_it = {**self._live_by_due, due: self._live_by_due[due] + 1}
        return _schedulable(with_it, self.version + (self._taken is not None), self.groups_per_step)

    def _make_ready(self, ticket: _Ticket) -> None:
        heapq.heappush(self._ready, (ticket.due, ticket.order))
        self._ready_by_due[ticket.due] += 1

    def _left_by_due(self, size: int) -> dict[int, int]:
        """The live groups by due that a batch of the `size` scored groups due first would leave behind."""
        left = dict(self._live_by_due)
        for due in sorted(self._ready_by_due):
            taken = min(size, self._ready_by_due[due])
            left[due] = left.get(due, 0) - taken
            size -= taken
        return left

    def _only_scored_left(self) -> bool:
        return not (self._counts[State.PENDING] or self._counts[State.LEASED] or self._counts[State.GENERATED])

    def _give_back(self, ticket: _Ticket, reason: str, retry: bool = True, blamed: bool = True) -> None:
        ticket.lease = None
        if blamed:
            self._blame(ticket, ticket.failures + 1)
        self._set_due(ticket, None)
        if not retry or ticket.failures >= self._max_failures:
            self._drop(ticket, reason)
            return
        self._reissued[reason] += 1
        self._move(ticket, State.PENDING)
        heapq.heappush(self._pending, ticket.order)

    def _blame(self, ticket: _Ticket, failures: int) -> None:
        ticket.failures = failures
        self._failed.add(ticket.order)

    def _drop(self, ticket: _Ticket, reason: str) -> None:
        self._drop_reasons[ticket.ticket_id] = reason
        self._move(ticket, State.DROPPED)

    def _move(self, ticket: _Ticket, state: State) -> None:
        if ticket.state in _ENDS:
            raise LedgerError(f"ticket {ticket.ticket_id} has ended as {ticket.state} and cannot become {state}")
        self._counts[ticket.state] -= 1
        self._counts[state] += 1
        ticket.state = state
        if state in _ENDS:
            self._failed.discard(ticket.order)
            self._is_trained[ticket.order] = state is State.TRAINED

    def _set_due(self, ticket: _Ticket, due: int | None) -> None:
        if ticket.due >= 0:
            self._live_by_due[ticket.due] -= 1
            if not self._live_by_due[ticket.due]:
                del self._live_by_due[ticket.due]
        ticket.due = -1 if due is None else due
        if due is not None:
            self._live_by_due[due] += 1

    def _plan_digest(self) -> str:
        if not self._digest:
            ids = "\n".join(ticket.ticket_id for ticket in self._tickets)
            self._digest = hashlib.sha256(ids.encode()).hexdigest()
        return self._digest


def _plan(sample_ids: Sequence[str], epochs: float, seed: int, limit: int | None) -> Iterator[_Ticket]:
    total = round(epochs * len(sample_ids))
    total = total if limit is None else min(total, limit)
    for order in range(total):
        epoch, place = divmod(order, len(sample_ids))
        if place == 0:
            shuffled = random.Random(f"{seed}/{epoch}").sample(list(sample_ids), len(sample_ids))
        yield _Ticket(order, f"{epoch}/{shuffled[place]}", shuffled[place], epoch)


def _schedulable(live_by_due: Mapping[int, int], next_version: int, groups_per_step: int) -> bool:
    """True when, for every version d, the groups due by d fit into the batches of `next_version`..d."""
    waiting = 0
    for due, count in sorted(live_by_due.items()):
        waiting += count
        if count and waiting > (due - next_version + 1) * groups_per_step:
            return False
    return True


def _ranges(flags: bytearray) -> list[list[int]]:
    """Inclusive [first, last] runs of the places at which a flag is 1."""
    runs: list[list[int]] = []
    end = 0
    while (first := flags.find(1, end)) >= 0:
        end = flags.find(0, first)
        end = len(flags) if end < 0 else end
        runs.append([first, end - 1])
    return runs
