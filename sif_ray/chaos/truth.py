"""What a simulated run must never do, checked where it would happen and after every event.

Nothing here reads the loop's own books, except to compare them with what really went over the wire and to the disk.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sif_ray.chaos.causes import explains_drop
from sif_ray.chaos.faults import Rates
from sif_ray.chaos.promise import Violation, promise
from sif_ray.clock import now_s
from sif_ray.config import GrpoConfig
from sif_ray.loop.checkpoint import Checkpoints
from sif_ray.loop.grpo import NO_SPREAD
from sif_ray.loop.requests import groups_per_engine
from sif_ray.method.progress import ProgressRecord
from sif_ray.observe.trail import read_trail
from sif_ray.records import RolloutGroup, ScoredGroup
from sif_ray.rollout.weights import WeightUpdate

FIRST_POLICY = hashlib.sha256(b"policy").hexdigest()


def score_of(text: str) -> float:
    """The judge's score of a completion, the same whenever and by whomever it is judged."""
    return hashlib.sha256(text.encode()).digest()[0] % 5 / 4


def next_policy(policy: str, ticket_ids: Sequence[str]) -> str:
    """The weights after a training step: they depend on all that they were ever trained on."""
    return hashlib.sha256(f"{policy} {sorted(ticket_ids)}".encode()).hexdigest()


def token_of(policy: str) -> int:
    """What an engine writes under these weights: every token shows whose it is."""
    return int(policy[:7], 16)


class History:
    """What a policy was trained on, from the first version on. It is what a learner keeps in its checkpoints."""

    def __init__(self, steps: Sequence[Mapping[str, int]] = ()) -> None:
        self.steps: list[dict[str, int]] = []  # {ticket id: version of its oldest token} of each
        self.policies = [FIRST_POLICY]  # by version
        for step in steps:
            self.add(step)

    @property
    def version(self) -> int:
        return len(self.steps)

    def add(self, step: Mapping[str, int]) -> None:
        self.steps.append(dict(step))
        self.policies.append(next_policy(self.policies[-1], list(step)))

    def tickets(self) -> set[str]:
        return {ticket_id for step in self.steps for ticket_id in step}


class Truth:
    """The promises of one simulated run, across the lives of its driver."""

    def __init__(self, config: GrpoConfig, num_prompts: int, most_at_once: Mapping[str, int]) -> None:
        """`most_at_once` is {what: how many a life may hold}: "tasks", "groups" that were generated."""
        self.config = config
        self.num_tickets = round(config.epochs * num_prompts)
        self._most_at_once = most_at_once
        self._held: dict[str, weakref.WeakValueDictionary[int, Any]] = {}
        self._scores: dict[str, list[float]] = {}  # by ticket: of the group that was trained
        self._equal: dict[str, set[float]] = {}  # by ticket: of groups without spread
        self._means: dict[str, dict[int, set[float]]] = {}  # by sample and epoch: of groups that were scored
        self._baselines: dict[str, set[int]] = {}  # by ticket: earlier epochs of its sample, trained before
        self._trained_now: dict[str, set[int]] = {}  # by sample: epochs that the learner was trained on since its start
        self.judge_calls = 0  # under way
        self.updating: set[Any] = set()  # engines that were sent an update and have neither acknowledged it nor gone
        self.let_go: dict[str, float] = {}  # engines that were told to go, and until when they may get work
        self.most_tasks = 0
        self._broken: Violation | None = None

    def promise(self, kept: bool, what: str) -> None:
        """Raise `Violation` unless it is kept. The code under test may catch that; `after_event` raises it again."""
        try:
            promise(kept, what)
        except Violation as violation:
            self._broken = violation
            raise

    def begin_life(self) -> None:
        """A driver starts, and what the one before held is gone."""
        self._held = {}
        self.judge_calls = 0
        self.updating = set()

    def begin_learner(self) -> None:
        """A learner starts, and the loop around it, from a checkpoint or the beginning."""
        self._trained_now = {}

    # --- while it runs -----------------------------------------------------------------------------------------------

    def may_train(self, history: History, groups: Sequence[ScoredGroup], version: int) -> None:
        """A batch arrives at the learner."""
        self.promise(version == history.version, f"a batch of version {version} for a learner at {history.version}")
        tickets = [scored.group.ticket_id for scored in groups]
        again = history.tickets() & set(tickets)
        self.promise(not again and len(set(tickets)) == len(tickets), f"trained twice: {sorted(again) or tickets}")
        for scored in groups:
            group = scored.group
            age = version - group.oldest_version
            self.promise(
                0 <= age <= self.config.max_staleness and group.newest_version <= version,
                f"{group.ticket_id}: tokens of versions {group.oldest_version} to {group.newest_version} at {version}, "
                f"max_staleness = {self.config.max_staleness}",
            )
            for rollout in group.rollouts:
                written = [token_of(history.policies[v]) for v, count in rollout.version_spans for _ in range(count)]
                self.promise(
                    rollout.token_ids_T.tolist() == written, f"{group.ticket_id}: tokens of weights never published"
                )
            self._scores[group.ticket_id] = self._scores_of(scored)
            self._trained_now.setdefault(group.sample_id, set()).add(_epoch_of(group.ticket_id))

    def may_update(self, name: str, held: int, wanted: int) -> None:
        """An update arrives at an engine."""
        self.promise(wanted > held, f"{name} holds version {held} and is sent {wanted}")

    def may_generate(self, name: str, ticket_id: str, held: int, acknowledged: int | None, tickets: int) -> None:
        """The loop asks an engine for something new; `acknowledged` is None while an update is under way, `tickets` is
        what the engine still owes it, this one included."""
        self.promise(
            acknowledged is not None,
            f"{name} was asked for {ticket_id} while its update was not acknowledged (it holds version {held})",
        )
        most = groups_per_engine(self.config.engine.max_num_seqs, self.config.group_size)
        self.promise(tickets <= most, f"{name} was given {tickets} tickets at once, at most {most} fit")

    def may_lease(self, name: str) -> None:
        """The loop asks an engine to answer a ticket."""
        self.promise(now_s() <= self.let_go.get(name, math.inf), f"{name} is given work after it was told to go")

    def may_leave(self, name: str, unanswered: Sequence[str], rates: Rates) -> None:
        """The loop ends an engine that lives, in the middle of the run."""
        given_up = any((rates.lost, rates.late, rates.asleep, rates.wrong_bytes))
        self.promise(given_up or not unanswered, f"{name} is ended while it answers {unanswered}")

    def may_score(self, ticket_id: str, previous: float | None) -> None:
        """The loop asks for rewards that are compared with `previous`: the mean of a group of an earlier epoch."""
        epoch, sample_id = _epoch_of(ticket_id), ticket_id.split("/", 1)[1]
        if previous is None:
            earlier = self._baselines[ticket_id]
            self.promise(not earlier, f"{ticket_id} is scored as if epochs {earlier} had not been")
        else:
            means = [means for scored, means in self._means.get(sample_id, {}).items() if scored < epoch]
            self.promise(previous in set().union(*means), f"{ticket_id} is compared with {previous}, scored: {means}")

    def was_scored(self, ticket_id: str, scores_G: Sequence[float]) -> None:
        """The loop gets the rewards of a ticket's group, which it may drop if they are all equal."""
        epoch, sample_id = _epoch_of(ticket_id), ticket_id.split("/", 1)[1]
        self._means.setdefault(sample_id, {}).setdefault(epoch, set()).add(sum(scores_G) / len(scores_G))
        if len(set(scores_G)) == 1:
            self._equal.setdefault(ticket_id, set()).add(scores_G[0])

    def holds_group(self, group: RolloutGroup) -> None:
        """The loop gets another group, and has let go of those that it needs no more."""
        epoch, trained = _epoch_of(group.ticket_id), self._trained_now.get(group.sample_id, set())
        self._baselines[group.ticket_id] = {one for one in trained if one < epoch}
        self._holds("groups", group, self._most_at_once["groups"])

    def holds_update(self, update: WeightUpdate) -> None:
        """The loop gets new weights. Older ones are only those that engines are being sent, or died of."""
        self._holds("updates", update, 1 + len(self.updating))

    def _holds(self, kind: str, thing: Any, most: int) -> None:
        held = self._held.setdefault(kind, weakref.WeakValueDictionary())
        held[max(held, default=0) + 1] = thing
        if len(held) > most:
            gc.collect()  # of errors, which refer to who raised them
            self._promise_few(kind, len(held), most)

    def after_event(self, num_tasks: int) -> None:
        """End the run if a promise was broken, or there are more tasks than it can need."""
        if self._broken is not None:
            raise self._broken
        if num_tasks > self.most_tasks:
            self.most_tasks = num_tasks
            self._promise_few("tasks", num_tasks, self._most_at_once["tasks"])

    def _promise_few(self, kind: str, count: int, most: int) -> None:
        self.promise(count <= most, f"{count} {kind}, at most {most} were expected")

    # --- what is left of it ------------------------------------------------------------------------------------------

    def check_checkpoint(self, checkpoints: Checkpoints, version: int) -> None:
        """The books of a checkpoint against those of the learner in it."""
        state = checkpoints.load(version, images_of=lambda sample_id: (b"", b""))
        ledger = state.ledger
        history = read_history(Path(checkpoints.learner_folder(version)))
        self.promise(history.version == version == ledger["version"], f"checkpoint {version} is of {history.version}")
        self.promise("judge unavailable" not in ledger["reissued"], "an outage of the judge is laid at tickets")
        trained = sum(last - first + 1 for first, last in ledger["trained"])
        self.promise(trained == len(history.tickets()), f"{trained} tickets closed, {len(history.tickets())} trained")
        known = history.tickets() | ledger["scored"].keys()
        self.promise(len(known) == trained + len(ledger["scored"]), "a ticket is trained and waits to be")
        scores = {ticket_id: self._scores[ticket_id] for ticket_id in history.tickets()}
        scores |= {ticket_id: self._scores_of(scored) for ticket_id, scored in state.groups.items()}
        equal = {ticket_id for ticket_id, reason in ledger["dropped"].items() if reason == NO_SPREAD}
        means = state.record["means"]
        record = ProgressRecord(self.config.profile)
        for ticket_id in sorted(known | equal, key=_epoch_of):
            epoch, sample_id = _epoch_of(ticket_id), ticket_id.split("/", 1)[1]
            if ticket_id in equal:  # the group is gone, and an attempt before it may have been without spread too
                kept = [mean for of_epoch, mean in means.get(sample_id, []) if of_epoch == epoch]
                self.promise(not kept or kept[0] in self._equal[ticket_id], f"{ticket_id} was dropped with mean {kept}")
                scores[ticket_id] = kept or [min(self._equal[ticket_id])]
            record.update(sample_id, scores[ticket_id], epoch)
        computed = record.state_dict()["means"]
        self.promise(means == computed, f"progress record of version {version}: {means}, by the groups {computed}")

    def check_end(self, folder: Path, checkpoints: Checkpoints, happened: Counter[str]) -> None:
        """A run that says it has finished, after these faults."""
        finished = json.loads((folder / "finished.json").read_text())
        history = read_history(folder / "checkpoint")
        trained, dropped = history.tickets(), set(finished["dropped"])
        self.promise(not trained & dropped, f"trained and dropped: {sorted(trained & dropped)}")
        self.promise(
            len(trained | dropped) == self.num_tickets,
            f"{len(trained)} tickets trained and {len(dropped)} dropped of {self.num_tickets}",
        )
        for ticket_id, reason in finished["dropped"].items():
            explained = explains_drop(happened, reason, self.config.dynamic_sampling)
            self.promise(explained, f"with {sorted(happened)} {ticket_id} was dropped: {reason}")
        self.promise(
            finished["version"] == history.version, f"finished at {finished['version']}, learner {history.version}"
        )
        trail = read_trail(folder / "trained.jsonl")
        self.promise(list(trail) == list(range(1, history.version + 1)), f"the trail is of versions {list(trail)}")
        self.promise(list(trail.values()) == history.steps, "the trail tells of other steps than the learner's")
        newest = checkpoints.newest_version()
        self.promise(newest == (history.version or None), f"the last checkpoint is {newest}")
        if newest is not None:
            self.check_checkpoint(checkpoints, newest)

    def _scores_of(self, scored: ScoredGroup) -> list[float]:
        """The judge's scores of a group, by what was written, which are those that it came with."""
        scores = [score_of(rollout.text) for rollout in scored.group.rollouts]
        found = scored.terms_G["answer_score"].tolist()
        self.promise(found == scores, f"{scored.group.ticket_id} has the rewards of others: {found} for {scores}")
        return scores


HISTORY = "history.json"


def write_history(folder: Path, history: History) -> None:
    """What the learner has instead of weights."""
    (folder / HISTORY).write_text(json.dumps(history.steps))


def read_history(folder: Path) -> History:
    """The inverse of `write_history`."""
    return History(json.loads((folder / HISTORY).read_text()))


def _epoch_of(ticket_id: str) -> int:
    return int(ticket_id.split("/", 1)[0])
