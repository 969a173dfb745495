"""Engines and scorers that die, hang, join and leave under a running loop: no ticket lost, no token too old."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import re
import weakref

import pytest
from loop_fakes import FakeEngine, FakeLearner, FakeScorer, MortalEngine, MortalScorer, Rig

from sif_ray.loop import pool
from sif_ray.loop.grpo import LoopError
from sif_ray.loop.pool import PoolError, WorkerDiedError
from sif_ray.rollout.errors import EngineDiedError, RolloutRequestError, WeightSyncError


@pytest.fixture(autouse=True)
def no_delay(monkeypatch):
    monkeypatch.setattr(pool, "RESTART_DELAY_S", 0.0)


def lines(caplog, pattern: str) -> list[str]:
    return [message for message in caplog.messages if re.search(pattern, message)]


async def until(task: asyncio.Task, condition) -> None:
    while not condition():
        if task.done():
            await task
            raise AssertionError("the run has ended before")
        await asyncio.sleep(0.001)


def all_trained_once(rig: Rig) -> bool:
    return sorted(rig.learner.trained) == sorted(f"0/{name}" for name in rig.samples)


# --- death -----------------------------------------------------------------------------------------------------------


def test_leases_of_a_dead_engine_return_at_once_and_its_successor_joins_at_the_current_version(caplog):
    """The only engine dies in the middle of the run, with long leases: waiting for their expiry would take minutes."""
    rig = Rig(num_engines=1, num_prompts=30, max_staleness=2, slow_s=0.1)
    rig.engines = [MortalEngine(rig.engines[0].rng, 0.1)]

    async def kill(task):
        await until(task, lambda: rig.learner.version >= 4 and rig.loop._engines.ready[0].leases)
        rig.engines[0].life.die()

    with caplog.at_level(logging.INFO):
        rig.run(beside=kill)
    assert all_trained_once(rig)
    assert max(rig.learner.staleness) <= 2
    (death,) = lines(caplog, "engine 0 is lost")
    returned = int(re.search(r"killed by the test; (\d+) leases returned to the ledger", death).group(1))
    assert returned > 0 and rig.ledger.counts()["reissued/engine lost"] == returned
    first, back = lines(caplog, "engine 0 is ready")
    assert "at version 0" in first
    assert int(re.search(r"at version (\d+); its place was empty for \d+\.\d s", back).group(1)) >= 4
    (_, successor) = rig.engine_factory.started[1]
    assert successor.version == rig.learner.version
    assert rig.engine_factory.ended == [rig.engines[0], successor]


def test_more_deaths_than_failures_allowed_do_not_drop_a_prompt():
    """Every prompt kills its engine five times; three failures of its own would drop it."""
    deaths: dict[str, int] = {}

    class Allergic(FakeEngine):
        async def generate(self, request):
            if not request.ticket_id.startswith("probe") and deaths.get(request.ticket_id, 0) < 5:
                deaths[request.ticket_id] = deaths.get(request.ticket_id, 0) + 1
                raise EngineDiedError("core dumped")
            return await super().generate(request)

    rig = Rig(num_engines=1, num_prompts=3, groups_per_step=1, max_staleness=0)
    rig.engines = [Allergic(rig.engines[0].rng) for _ in range(16)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "MAX_RESTARTS", 100)
        rig.run()
    assert all_trained_once(rig)
    assert set(deaths.values()) == {5}


@pytest.mark.parametrize("hangs", [False, True])
def test_sync_does_not_wait_for_an_engine_that_dies_in_it(hangs):
    """Death in the update itself, and death of an engine whose update never answers."""

    class DiesInUpdate(MortalEngine):
        async def update_weights(self, update):
            if update.version == 2:
                if not hangs:
                    raise EngineDiedError("died while loading")
                asyncio.get_running_loop().call_later(0.05, self.life.die)
                return await self.life.call(asyncio.Event().wait())
            return await super().update_weights(update)

    rig = Rig(num_prompts=30)
    rig.engines[1] = DiesInUpdate(rig.engines[1].rng)
    rig.run()
    assert all_trained_once(rig)
    assert [name for name, _ in rig.engine_factory.started] == ["engine 0", "engine 1", "engine 1"]


def test_weights_that_a_dead_engine_was_given_are_let_go():
    """In a run they are as large as the policy, in the object store."""
    published: list[weakref.ref] = []

    class Remembering(FakeLearner):
        async def publish(self, version):
            update = await super().publish(version)
            published.append(weakref.ref(update))
            return update

    class DiesInUpdate(FakeEngine):
        async def update_weights(self, update):
            raise EngineDiedError("died while loading")

    rig = Rig(num_engines=1, num_prompts=60)
    rig.engines = [DiesInUpdate(rig.engines[0].rng)]
    rig.learner = Remembering(rig.engines[0].rng)
    held: list[int] = []

    async def watch(task):
        await until(task, lambda: rig.learner.version >= 6)
        gc.collect()
        held.append(sum(update() is not None for update in published))

    rig.run(beside=watch)
    assert len(rig.engine_factory.started) == 2
    assert held[0] <= 1  # none while the next is published


def test_groups_of_a_dead_scorer_are_scored_by_another_one_without_new_rollouts(caplog):
    rig = Rig(num_reward_workers=2, slow_s=0.02, num_prompts=20)
    rng = rig.scorers[0].rng
    rig.scorers = [MortalScorer(rng, 0.02), FakeScorer(rng, 0.02)]

    async def kill(task):
        await until(task, lambda: rig.loop._scorers.ready and rig.loop._scorers.ready[0].calls)
        rig.scorers[0].life.die()

    with caplog.at_level(logging.INFO):
        rig.run(beside=kill)
    assert all_trained_once(rig)
    tickets = [r.ticket_id for e in rig.engines for r in e.requests if not r.ticket_id.startswith("probe")]
    assert len(tickets) == len(set(tickets)) == 20
    (death,) = lines(caplog, "reward 0 is lost")
    assert re.search(r"killed by the test; [1-9]\d* groups go to another one", death)
    assert len(lines(caplog, "reward 0 is ready")) == 2


@pytest.mark.parametrize("kind", ["engine", "reward"])
def test_worker_that_never_starts_ends_the_run_with_its_cause(kind):
    attempts = 0

    async def fail(name):
        nonlocal attempts
        attempts += 1
        raise RuntimeError("Engine core initialization failed: no memory")

    rig = Rig(num_engines=1)
    factory = {"engine": rig.engine_factory, "reward": rig.scorer_factory}[kind]
    factory.start = fail
    with pytest.raises(PoolError, match=rf"{kind} 0 was lost 4 times within .*RuntimeError: Engine core .* no memory"):
        rig.run()
    assert attempts == pool.MAX_RESTARTS + 1


def test_policy_that_no_engine_can_take_is_not_tried_again():
    attempts = 0

    async def refuse(name):
        nonlocal attempts
        attempts += 1
        raise WeightSyncError("tie_word_embeddings is true")

    rig = Rig(num_engines=1)
    rig.engine_factory.start = refuse
    with pytest.raises(WeightSyncError, match="tie_word_embeddings"):
        rig.run()
    assert attempts == 1


def test_engine_that_keeps_dying_in_the_run_ends_it():
    class Weak(FakeEngine):
        async def generate(self, request):
            await asyncio.sleep(0.001)
            raise WorkerDiedError("SIGSEGV")

    rig = Rig(num_engines=2)
    rig.engine_factory.make = lambda: Weak(rig.engines[0].rng)
    rig.engines = [rig.engine_factory.make()]
    with pytest.raises(PoolError, match=r"engine \d was lost 4 times .* the last time: SIGSEGV"):
        rig.run()
    assert len(rig.engine_factory.ended) == len(rig.engine_factory.started)


# --- joining and leaving ---------------------------------------------------------------------------------------------


def test_loop_starts_with_the_engines_that_are_there():
    """The second engine finds room in the cluster only when four steps are done."""
    rig = Rig(num_engines=2, num_prompts=40)
    start = rig.engine_factory.start
    joined_at: list[int] = []

    async def start_when_there_is_room(name):
        if name == "engine 1":
            while rig.learner.version < 4:
                await asyncio.sleep(0.001)
            joined_at.append(rig.learner.version)
        return await start(name)

    rig.engine_factory.start = start_when_there_is_room
    rig.run()
    assert all_trained_once(rig)
    assert joined_at == [4]
    late = rig.engine_factory.started[1][1]
    assert late.requests and max(rig.learner.staleness) <= 1


def test_engine_that_is_removed_finishes_what_it_holds_and_one_that_is_added_works(caplog):
    rig = Rig(num_engines=1, num_prompts=40, slow_s=0.02)

    async def exchange(task):
        await until(task, lambda: rig.learner.version >= 2)
        assert rig.loop.add_engine() == "engine 1"
        await until(task, lambda: len(rig.loop._engines.ready) == 2)
        rig.loop.remove_engine("engine 0")
        with pytest.raises(ValueError, match="engine 1 is the last engine"):
            rig.loop.remove_engine("engine 1")

    with caplog.at_level(logging.INFO):
        rig.run(beside=exchange)
    assert all_trained_once(rig)
    assert not any(name.startswith("reissued") for name in rig.ledger.counts())
    old, new = (worker for _, worker in rig.engine_factory.started)
    assert rig.engine_factory.ended == [old, new]
    assert len(old.requests) < 20 and new.requests
    assert lines(caplog, "engine 0 has left") and not lines(caplog, "is lost")


def test_unknown_engine_cannot_be_removed():
    rig = Rig()

    async def remove(task):
        await asyncio.sleep(0.01)
        with pytest.raises(ValueError, match="there is no engine 7; there are engine 0, engine 1"):
            rig.loop.remove_engine("engine 7")

    rig.run(beside=remove)


# --- stuck -----------------------------------------------------------------------------------------------------------


def hang_once(hung: list[str]):
    """Never answers the first caller that comes here."""

    async def wait(name: str) -> None:
        if not hung:
            hung.append(name)
            await asyncio.Event().wait()

    return wait


@pytest.mark.parametrize("what", ["generate", "update_weights", "start"])
def test_engine_that_never_answers_is_named_and_replaced(what, caplog):
    hang = hang_once([])

    class Hangs(FakeEngine):
        async def generate(self, request):
            if what == "generate" and self.version == 1:
                self.hung = True
            if getattr(self, "hung", False):
                await asyncio.Event().wait()
            return await super().generate(request)

        async def update_weights(self, update):
            if what == "update_weights" and update.version == 2:
                await hang("update")
            return await super().update_weights(update)

    rig = Rig(num_engines=1, stuck_after_s=0.6, lease_timeout_s=60.0)
    rig.engines = [Hangs(rig.engines[0].rng)]
    start = rig.engine_factory.start

    async def slow_start(name):
        if what == "start":
            await hang("start")
        return await start(name)

    rig.engine_factory.start = slow_start
    rig.run()
    assert all_trained_once(rig)
    named = {"generate": "generate 0/p", "update_weights": "update to version 2", "start": "start"}[what]
    (stuck,) = lines(caplog, "engine 0 is stuck: it has answered nothing for ")
    assert re.search(rf"engine 0: \d calls? under way, the oldest for \d+ s: {named}", stuck)
    assert re.search(r"the learner: waits for (a batch|an engine)|the sync: waits for receipts of version 2", stuck)
    assert re.search(r"1 task: grpo.py:\d+ _dispatch > grpo.py:\d+ _until > grpo.py:\d+ _wait_for > locks.py", stuck)
    assert len(lines(caplog, "engine 0 is lost: it is stuck and has answered nothing")) == 1
    if what != "start":
        assert lines(caplog, "stacks of engine 0: in Hangs")


def test_worker_that_is_given_up_as_its_start_ends_does_not_join(caplog):
    """Verdict and answer in the same moment: work given to it then would wait for its lease to expire."""
    rig = Rig(num_engines=1, lease_timeout_s=60.0)
    start = rig.engine_factory.start
    starts: list[str] = []

    async def start_too_late(name):
        worker = await start(name)
        starts.append(name)
        if len(starts) == 1:
            slot = rig.loop._engines.find(name)
            rig.loop._engines.give_up(slot, "it is stuck")
        return worker

    rig.engine_factory.start = start_too_late
    with caplog.at_level(logging.INFO):
        rig.run()
    assert all_trained_once(rig)
    assert starts == ["engine 0", "engine 0"]
    assert not rig.engines[0].requests
    assert len(lines(caplog, "engine 0 is ready")) == 1


def test_sample_that_engines_refuse_is_not_probed_and_its_ticket_is_dropped(caplog):
    class Refuses(FakeEngine):
        async def generate(self, request):
            if request.sample_id == "p0":
                raise RolloutRequestError("the prompt has 9000 tokens, max_model_len is 4096")
            return await super().generate(request)

    rig = Rig(parity_every=1)
    rig.engines = [Refuses(engine.rng) for engine in rig.engines]
    rig.run()
    assert rig.ledger.dropped() == {"0/p0": "request refused: the prompt has 9000 tokens, max_model_len is 4096"}
    assert sorted(rig.learner.trained) == sorted(f"0/{name}" for name in rig.samples if name != "p0")
    assert lines(caplog, "version 0: engine . was not probed: the prompt has 9000 tokens")
    assert [step for step, values in rig.recorder.metrics if "parity_mean_abs" not in values] == [1]


def test_scorer_that_never_answers_is_named_and_replaced(caplog):
    hang = hang_once([])

    class Hangs(FakeScorer):
        async def score(self, texts_G, sample, previous):
            await hang("score")
            return await super().score(texts_G, sample, previous)

    rig = Rig(stuck_after_s=0.6, lease_timeout_s=60.0, num_prompts=3)
    rig.scorers = [Hangs(rig.scorers[0].rng)]
    rig.run()
    assert all_trained_once(rig)
    assert len([r for e in rig.engines for r in e.requests if not r.ticket_id.startswith("probe")]) == 3
    assert lines(caplog, r"reward 0 is stuck: it has answered nothing .* the oldest for \d+ s: score ticket 0/p")


@pytest.mark.parametrize("call", ["train", "publish", "log_probs"])
def test_learner_that_never_returns_ends_the_run_and_is_named(call):
    class Hangs(FakeLearner):
        pass

    async def hang(self, *args):
        await asyncio.Event().wait()

    setattr(Hangs, call, hang)
    rig = Rig(stuck_after_s=0.6, lease_timeout_s=60.0)
    rig.learner = Hangs(rig.learner.rng)
    what = {"train": "train version 0", "publish": "publish version 1", "log_probs": "probe version 0"}[call]
    with pytest.raises(LoopError, match=f"the learner is stuck: it has answered nothing for .*: {what}; if it is only"):
        rig.run()


def test_engine_full_of_expired_requests_is_replaced_without_a_watchdog(caplog):
    class Hung(FakeEngine):
        async def generate(self, request):
            await asyncio.Event().wait()

    rig = Rig(num_engines=1, stuck_after_s=0.0, lease_timeout_s=0.2, num_prompts=40, groups_per_step=10)
    rig.engines = [Hung(rig.engines[0].rng)]
    rig.run()
    assert all_trained_once(rig)
    assert lines(caplog, "engine 0 is lost: it has answered none of its 9 requests within lease_timeout_s = 0.2")


# --- any order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(25))
def test_every_ticket_ends_once_within_the_bound_whatever_dies_joins_and_leaves(seed, monkeypatch):
    """Deaths at start, in leases and in syncs, engines added and removed, judges that fail, groups without spread and
    an evaluation beside it, all drawn by chance."""
    monkeypatch.setattr(pool, "MAX_RESTARTS", 10**6)
    rng = random.Random(seed)
    death_rate = rng.choice([0.0, 0.03, 0.1])
    max_staleness = rng.randint(0, 3)
    rig = Rig(
        seed=seed,
        num_engines=rng.randint(1, 3),
        num_reward_workers=rng.randint(1, 2),
        num_prompts=rng.randint(5, 25),
        epochs=rng.choice([1.0, 2.0]),
        groups_per_step=rng.randint(1, 4),
        max_staleness=max_staleness,
        lease_timeout_s=rng.choice([0.03, 30.0]),
        dynamic_sampling=rng.random() < 0.5,
        eval_every=rng.choice([0, 1, 3]),
        slow_s=0.01,
    )
    rig.eval_samples = list(rig.samples.values())[:4]
    start = rig.engine_factory.start

    class FlatAtTimes(MortalScorer):
        async def score(self, texts_G, sample, previous):
            scores = await super().score(texts_G, sample, previous)
            if self.rng.random() < 0.2:
                scores.rewards_G[:] = 1.0
            return scores

    async def fragile_start(name):
        if rng.random() < death_rate:
            raise EngineDiedError("died while starting")
        return await start(name)

    rig.engine_factory.start = fragile_start
    rig.engine_factory.make = lambda: MortalEngine(rng, 0.01, death_rate)
    rig.scorer_factory.make = lambda: FlatAtTimes(rng, 0.01, death_rate / 4)  # many calls are under way in it
    rig.engines, rig.scorers = [], []

    async def meddle(task):
        while not task.done():
            await asyncio.sleep(rng.random() * 0.05)
            names = rig.loop.engine_names
            if task.done():
                return
            if len(names) < 4 and rng.random() < 0.5:
                with contextlib.suppress(ValueError):  # the run is ending
                    rig.loop.add_engine()
            elif len(names) > 1:
                rig.loop.remove_engine(rng.choice(names))

    rig.run(beside=meddle)
    dropped = rig.ledger.dropped()
    assert rig.ledger.done
    assert len(rig.learner.trained) == len(set(rig.learner.trained))
    assert not set(rig.learner.trained) & set(dropped)
    assert len(rig.learner.trained) + len(dropped) == rig.ledger.num_tickets
    assert "engine lost" not in dropped.values()
    assert max(rig.learner.staleness, default=0) <= max_staleness
    assert len(rig.engine_factory.ended) == len(rig.engine_factory.started), "an engine was left running"


def test_no_engine_is_added_to_a_run_that_an_error_is_ending():
    rig, refused = Rig(), []
    end = rig.engine_factory.end

    async def broken(groups, version):
        raise OSError("a defect")

    async def add_another_and_end(worker):
        with pytest.raises(ValueError, match="the run is ending") as refusal:
            rig.loop.add_engine()
        refused.append(refusal)
        await end(worker)

    rig.learner.train, rig.engine_factory.end = broken, add_another_and_end
    with pytest.raises(OSError, match="a defect"):
        rig.run()
    assert len(refused) == 2 and rig.loop.engine_names == []


def test_no_engine_is_added_to_a_run_that_has_ended():
    rig = Rig().run()
    with pytest.raises(ValueError, match="the run is ending and starts no further engine"):
        rig.loop.add_engine()
