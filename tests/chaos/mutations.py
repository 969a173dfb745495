"""Bugs that somebody could make in the control plane, each as a change of its text, and the promise that it breaks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """`old` stands once in the file of the package."""

    name: str
    promise: str
    file: str
    old: str
    new: str


MUTATIONS = [
    # --- each ticket ends once ---
    Mutation(
        "the result of an expired lease counts",
        "each ticket ends once",
        "loop/ledger.py",
        "if ticket.lease is not lease and ticket.lease != lease:",
        "if False:",
    ),
    Mutation(
        "a resumed run trains the last closed ticket again",
        "each ticket ends once",
        "loop/ledger.py",
        "for order in range(first, last + 1):",
        "for order in range(first, last):",
    ),
    Mutation(
        "a batch is saved as trained while it is in training",
        "each ticket ends once",
        "loop/grpo.py",
        "groups = [self._scored.pop(ticket_id) for ticket_id in batch.ticket_ids]",
        "groups = [self._scored[ticket_id] for ticket_id in batch.ticket_ids]",
    ),
    Mutation(
        "rewards that come after the lease count",
        "each ticket ends once",
        "loop/grpo.py",
        "        if not self._ledger.holds(lease):\n            return\n        if isinstance",
        "        if isinstance",
    ),
    Mutation(
        "leases never expire",
        "the run ends",
        "loop/ledger.py",
        "while self._expiries and self._expiries[0][0] <= self._now_s():",
        "while False:",
    ),
    Mutation(
        "what an engine held when it died is dropped",
        "each ticket ends once",
        "loop/ledger.py",
        "self._give_back(ticket, reason, blamed=False)",
        "self._give_back(ticket, reason, retry=False)",
    ),
    Mutation(
        "the first failure of a ticket is its last",
        "each ticket ends once",
        "loop/ledger.py",
        "max_failures: int = 3,",
        "max_failures: int = 1,",
    ),
    Mutation(
        "an outage of the judge is laid at the door of tickets",
        "each ticket ends once",
        "loop/grpo.py",
        "if isinstance(scores, ScoringFailed) and self._outage is not None:",
        "if False:",
    ),
    # --- no token older than the window ---
    Mutation(
        "a group may wait one version too long",
        "no token older than the window",
        "loop/ledger.py",
        "self._set_due(ticket, oldest_version + self.max_staleness)",
        "self._set_due(ticket, oldest_version + self.max_staleness + 1)",
    ),
    Mutation(
        "a resumed group has one version more",
        "no token older than the window",
        "loop/ledger.py",
        "self._set_due(self._by_id[ticket_id], due)",
        "self._set_due(self._by_id[ticket_id], due + 1)",
    ),
    Mutation(
        "a batch leaves groups behind that no other can hold",
        "no token older than the window",
        "loop/ledger.py",
        "if not _schedulable(self._left_by_due(size), self.version + 1, self.groups_per_step):",
        "if False:",
    ),
    # --- versions only grow ---
    Mutation(
        "the version before is published again",
        "versions only grow",
        "loop/grpo.py",
        "update = await self._publish(version)",
        "update = await self._publish(max(version - 1, 1))",
    ),
    Mutation(
        "a resumed run does not bring the engines up to date",
        "versions only grow",
        "loop/grpo.py",
        "                if self._ledger.version:\n                    await self._publish(self._ledger.version)",
        "                if self._ledger.version:\n                    self._published = 0",
    ),
    Mutation(
        "an evaluation does not hold its engine",
        "versions only grow",
        "loop/grpo.py",
        "        slot.evaluating = True\n",
        "        slot.evaluating = False\n",
    ),
    Mutation(
        "the trail does not say from where it goes on",
        "versions only grow",
        "loop/stage.py",
        "continue_from=ledger.version",
        "continue_from=0",
    ),
    # --- no engine generates with weights that nobody acknowledged ---
    Mutation(
        "an engine is asked while it is updated",
        "acknowledged weights",
        "loop/grpo.py",
        "if not slot.updating and len(slot.leases) < self._groups_per_engine:",
        "if len(slot.leases) < self._groups_per_engine:",
    ),
    Mutation(
        "receipts are not read",
        "acknowledged weights",
        "loop/grpo.py",
        "if found != wanted:",
        "if False:",
    ),
    # --- the progress record is that of a serial computation ---
    Mutation(
        "the record forgets the epoch",
        "progress record",
        "loop/grpo.py",
        'scores.terms_G["answer_score"].tolist(), lease.epoch)',
        'scores.terms_G["answer_score"].tolist())',
    ),
    Mutation(
        "the record is not continued",
        "progress record",
        "loop/stage.py",
        "        record.load_state_dict(state.record)\n",
        "",
    ),
    Mutation(
        "rewards are not compared with the last epoch",
        "progress record",
        "loop/grpo.py",
        "previous = self._record.previous(lease.sample_id, lease.epoch)",
        "previous = None",
    ),
    # --- memory is bounded, nothing hangs ---
    Mutation(
        "an engine gets all there is",
        "bounded memory",
        "loop/grpo.py",
        "if not slot.updating and len(slot.leases) < self._groups_per_engine:",
        "if not slot.updating:",
    ),
    Mutation(
        "calls of the lost are kept",
        "bounded memory",
        "loop/pool.py",
        "            pending.cancel()\n            await asyncio.gather(pending, return_exceptions=True)\n",
        "            pass\n",
    ),
    Mutation(
        "a lost worker is not ended",
        "bounded memory",
        "loop/pool.py",
        "                await self._factory.end(member.worker)\n",
        "                pass\n",
    ),
    Mutation(
        "nobody is ever stuck",
        "the run ends",
        "loop/watchdog.py",
        "        if not self._stuck_after_s:\n",
        "        if True:\n",
    ),
    Mutation(
        "nobody watches the last write of the learner",
        "the run ends",
        "loop/stage.py",
        "async with asyncio.timeout(stuck_after_s or None):",
        "async with asyncio.timeout(None):",
    ),
    Mutation(
        "a refused probe ends the run",
        "the run ends",
        "loop/parity.py",
        "except RolloutRequestError as error:",
        "except ZeroDivisionError as error:",
    ),
    Mutation(
        "groups that were trained are kept",
        "bounded memory",
        "loop/grpo.py",
        "groups = [self._scored.pop(ticket_id) for ticket_id in batch.ticket_ids]",
        "groups = self.__dict__[batch.version] = [self._scored.pop(name) for name in batch.ticket_ids]",
    ),
    Mutation(
        "updates that every engine has are kept",
        "bounded memory",
        "loop/grpo.py",
        "            del step  # the store keeps",
        "            vars(self).setdefault('kept', []).append(step)  # the store keeps",
    ),
    Mutation(
        "the death of a worker ends the run",
        "the run ends",
        "loop/pool.py",
        "        except WorkerDiedError as error:\n            return error\n",
        "        except ZeroDivisionError as error:\n            return error\n",
    ),
    Mutation(
        "who replaces a dead worker keeps the error that it died of",
        "bounded memory",
        "loop/pool.py",
        "                del error  # with",
        "                pass  # with",
    ),
    Mutation(
        "the loop that a learner's death has ended is kept",
        "bounded memory",
        "loop/stage.py",
        "                del death  # with",
        "                pass  # with",
    ),
    Mutation(
        "no worker is replaced",
        "the run ends",
        "loop/pool.py",
        "MAX_RESTARTS = 3 ",
        "MAX_RESTARTS = 0 ",
    ),
    Mutation(
        "no learner is replaced",
        "the run ends",
        "loop/stage.py",
        "MAX_LEARNER_DEATHS = 3 ",
        "MAX_LEARNER_DEATHS = 0 ",
    ),
    Mutation(
        "a run that stops for want of a judge says that it has finished",
        "the run ends",
        "loop/grpo.py",
        "        if self._outage is not None:\n            raise",
        "        if False:\n            raise",
    ),
    # --- an engine that is told to go answers what it holds, and nothing more ---
    Mutation(
        "an engine that was told to go gets work",
        "engines leave",
        "loop/pool.py",
        "if member.ready and not member.draining]",
        "if member.ready]",
    ),
    Mutation(
        "an engine that is told to go ends at once",
        "engines leave",
        "loop/grpo.py",
        "if slot.draining and not slot.evaluating and not any(self._ledger.holds(lease) for lease in slot.leases):",
        "if slot.draining:",
    ),
    Mutation(
        "an engine that was told to go starts again when it dies",
        "engines leave",
        "loop/pool.py",
        "            while not self._places[name].draining:\n",
        "            while self._places[name]:\n",
    ),
    # --- a checkpoint is there whole or not at all ---
    Mutation(
        "sizes of files are not compared",
        "whole checkpoints",
        "checkpoints.py",
        "            if found != size:\n",
        "            if False:\n",
    ),
    Mutation(
        "groups are read without their digest",
        "whole checkpoints",
        "loop/checkpoint.py",
        'if digest_files((path,)) != saved["groups_digest"]:',
        "if False:",
    ),
    Mutation(
        "a checkpoint is written where it is read",
        "whole checkpoints",
        "checkpoints.py",
        'return path.with_name(f".{path.name}.part")',
        "return path",
    ),
    # --- limits of the judge ---
    Mutation(
        "one call too many at once",
        "limits of the judge",
        "judge/limits.py",
        "asyncio.Semaphore(max_concurrency)",
        "asyncio.Semaphore(max_concurrency + 1)",
    ),
    Mutation(
        "every worker takes all of the calls for itself",
        "limits of the judge",
        "judge/caller.py",
        "config.max_concurrency // num_workers",
        "config.max_concurrency",
    ),
    Mutation(
        "a judge that asks for patience gets none",
        "limits of the judge",
        "judge/caller.py",
        "self._limits.pause(pause_s)",
        "pass",
    ),
    Mutation(
        "a judge that is down is asked the calls that wait",
        "limits of the judge",
        "judge/caller.py",
        "                if self._breaker.is_open:\n",
        "                if False:\n",
    ),
    Mutation(
        "calls are not spread over the minute",
        "limits of the judge",
        "judge/limits.py",
        "            self._next_s = now_s() + self._spacing_s\n",
        "",
    ),
    Mutation(
        "an attempt from before the outage ends the turn of the one that probes",
        "limits of the judge",
        "judge/breaker.py",
        "self._probing &= not probed",
        "self._probing = False",
    ),
    Mutation(
        "everybody probes a judge that is down",
        "limits of the judge",
        "judge/breaker.py",
        "return math.inf if self._probing else max",
        "return max",
    ),
    Mutation(
        "a judge that is down gets no time",
        "limits of the judge",
        "judge/breaker.py",
        "self._open_until_s = now_s() + self._cooldown_s",
        "self._open_until_s = now_s()",
    ),
]
