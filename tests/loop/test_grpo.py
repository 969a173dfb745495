"""The loop's control flow with parts in one process: bounds kept, each prompt once, errors end the run."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
import weakref

import numpy as np
import pytest
from loop_fakes import FakeEngine, FakeLearner, FakeScorer, Rig

from sif_ray.config import PlacementConfig, PromptConfig
from sif_ray.judge.outcome import JudgeUnavailable
from sif_ray.loop.grpo import LoopError
from sif_ray.loop.rewarder import ScoringFailed
from sif_ray.loop.step_metrics import judge_totals, receipt_metrics
from sif_ray.rollout.errors import RolloutRequestError
from sif_ray.rollout.weights import Receipt


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_every_prompt_is_trained_once_within_the_bound(max_staleness, seed):
    rig = Rig(max_staleness=max_staleness, seed=seed, epochs=2.0).run()
    assert len(rig.learner.trained) == len(set(rig.learner.trained)) == 28
    assert max(rig.learner.staleness) <= max_staleness
    assert rig.ledger.version == rig.learner.version == 10
    assert [engine.version for engine in rig.engines] == [10, 10]
    if max_staleness:
        assert max(rig.learner.staleness) > 0, "nothing overlapped: the test shows nothing"


def test_generation_goes_on_while_the_learner_trains():
    spans = Rig(num_prompts=30, max_staleness=2, slow_s=0.03).run().recorder.spans
    training = [(start, end) for lane, kind, start, end, _ in spans if kind == "train"]
    generating = [(start, end) for lane, kind, start, end, _ in spans if kind == "generate"]
    assert any(g0 < t1 and t0 < g1 for g0, g1 in generating for t0, t1 in training)


@pytest.mark.parametrize("colocate", [False, True])
def test_a_learner_that_shares_gpus_starts_after_its_engines(colocate):
    rig = Rig(placement=PlacementConfig(colocate=colocate), num_engines=3, slow_s=0.05)
    filled = []

    async def learner_ready() -> None:
        filled.append(rig.loop._engines.all_started)
        await asyncio.sleep(0)

    rig.learner_ready = learner_ready
    rig.run()
    assert filled == [colocate]
    assert len(rig.learner.trained) == 14


def test_on_policy_run_never_generates_while_it_trains():
    spans = Rig(num_prompts=30, max_staleness=0).run().recorder.spans
    training = [(start, end) for lane, kind, start, end, _ in spans if kind == "train"]
    generating = [(start, end) for lane, kind, start, end, _ in spans if kind == "generate"]
    assert not any(g0 < t1 and t0 < g1 for g0, g1 in generating for t0, t1 in training)


def test_engines_share_the_work():
    rig = Rig(num_prompts=40, num_engines=3).run()
    shares = [len(engine.requests) for engine in rig.engines]
    assert min(shares) >= 40 // 6


def test_engine_is_never_given_more_than_it_holds():
    class Counting(FakeEngine):
        running = most = 0

        async def generate(self, request):
            if request.ticket_id.startswith("probe"):
                return await super().generate(request)
            self.running += 1
            self.most = max(self.most, self.running)
            try:
                return await super().generate(request)
            finally:
                self.running -= 1

    rig = Rig(num_prompts=40, num_engines=1, groups_per_step=10)
    rig.engines = [Counting(rig.engines[0].rng)]
    rig.run()
    assert rig.engines[0].most == 9  # twice max_num_seqs 8 / group_size 2, and one


def test_every_group_has_its_own_seed_and_the_same_in_every_run():
    def seeds(order: int) -> dict[str, int]:
        rig = Rig(seed=order).run()
        return {request.ticket_id: request.seed for engine in rig.engines for request in engine.requests}

    once, again = seeds(0), seeds(1)
    tickets = [ticket for ticket in once if not ticket.startswith("probe")]
    assert [once[ticket] for ticket in tickets] == [again[ticket] for ticket in tickets]
    assert len({once[ticket] for ticket in tickets}) == 14


@pytest.mark.parametrize("depth_image", [True, False])
def test_requests_carry_the_images_that_the_prompt_asks_for(depth_image):
    rig = Rig(prompt=PromptConfig(depth_image=depth_image)).run()
    wanted = (b"rgb", b"depth") if depth_image else (b"rgb",)
    assert {request.images for engine in rig.engines for request in engine.requests} == {wanted}


def test_second_epoch_is_scored_against_the_first():
    rig = Rig(epochs=2.0, num_prompts=30, max_staleness=0).run()  # no prompt is in flight twice
    assert all(previous == [None, 0.5] for previous in rig.scorers[0].previous.values())


def test_weights_that_every_engine_has_are_let_go_before_the_next_are_published():
    updates = []

    class Publishing(FakeLearner):
        async def publish(self, version):
            assert not [update for update in updates if update() is not None]
            update = await super().publish(version)
            updates.append(weakref.ref(update))
            return update

    rig = Rig(max_staleness=2)
    rig.learner = Publishing(rig.learner.rng)
    rig.run()
    assert len(updates) == rig.ledger.version > 3


def test_receipts_say_how_long_engines_stood_still_and_what_their_caches_saved():
    receipt = Receipt(1, 2, 8, 0, "engine", seconds=0.5, pause_s=0.1, prompt_tokens=80, computed_prompt_tokens=20)
    fresh = dataclasses.replace(receipt, pause_s=0.3, prompt_tokens=0, computed_prompt_tokens=0)
    assert receipt_metrics([receipt, receipt, fresh]) == {"sync_pause_s": 0.3, "prompt_cache_share": 0.75}
    assert receipt_metrics([fresh]) == {"sync_pause_s": 0.3}
    assert receipt_metrics([]) == {}


def test_metrics_of_every_step():
    rig = Rig().run()
    steps = [step for step, _ in rig.recorder.metrics]
    assert steps == [1, 2, 3, 4, 5]
    names = (
        "reward/total reward/format reward/answer reward/box reward/depth answer_score iou_last loss no_spread_share "
        "completions_per_s generated_tokens_per_s completion_tokens_mean truncated_share sync_s sync_bytes "
        "learner_idle_share engine_idle_share tickets/pending tickets/leased tickets/trained tickets/dropped"
    )
    for _, values in rig.recorder.metrics:
        assert set(names.split()) <= values.keys()
    first = rig.recorder.metrics[0][1]
    assert first["reward/total"] == 0.5 and first["completion_tokens_mean"] == 10 and first["no_spread_share"] == 0
    assert [values["tickets/trained"] for _, values in rig.recorder.metrics] == [3, 6, 9, 12, 14]
    last = rig.recorder.metrics[-1][1]
    assert 9 <= last["judge/calls"] <= 14 and last["judge/latency_p95_s"] == 0.5  # asked beside the loop


@pytest.mark.parametrize(("engine_s", "learner_s"), [(0.1, 0.0), (0.0, 0.1)])
def test_who_waits_for_the_slow_one_is_idle(engine_s, learner_s):
    rig = Rig(max_staleness=0, slow_s=engine_s)
    rig.learner = FakeLearner(random.Random(0), slow_s=learner_s)
    rig.run()
    engine = np.mean([values["engine_idle_share"] for _, values in rig.recorder.metrics])
    learner = np.mean([values["learner_idle_share"] for _, values in rig.recorder.metrics])
    idle, busy = (learner, engine) if engine_s else (engine, learner)
    assert idle > 0.6 and idle > busy + 0.2


def test_totals_of_judges_add_up_but_latencies_do_not():
    judges = [{"judge/calls": 3.0, "judge/latency_p95_s": 0.2}, {"judge/calls": 4.0, "judge/latency_p95_s": 0.5}, {}]
    assert judge_totals(judges) == {"judge/calls": 7.0, "judge/latency_p95_s": 0.5}


# --- weights and parity ----------------------------------------------------------------------------------------------


def test_probe_compares_the_same_version_and_leaves_training_alone():
    rig = Rig(max_staleness=2).run()
    assert rig.learner.probed_at == [0, 2, 4]
    logged = {step: values["parity_mean_abs"] for step, values in rig.recorder.metrics if "parity_mean_abs" in values}
    assert logged == {1: 0.25, 3: 0.25, 5: 0.25}
    assert not any(ticket.startswith("probe") for ticket in rig.learner.trained)
    asked = [request for engine in rig.engines for request in engine.requests]
    assert all(request.urgent == request.ticket_id.startswith("probe") for request in asked)


def test_large_difference_in_the_probe_is_an_alarm(caplog):
    with caplog.at_level(logging.WARNING):
        Rig(parity_alarm=0.2).run()
    assert "differ by 0.25" in caplog.text


@pytest.mark.parametrize("change", [{"version": 99}, {"checksum": 1}, {"num_tensors": 0}])
def test_receipt_that_does_not_match_ends_the_run(change):
    class Forgetful(FakeEngine):
        async def update_weights(self, update):
            return dataclasses.replace(await super().update_weights(update), **change)

    rig = Rig()
    rig.engines[1] = Forgetful(rig.engines[1].rng)
    with pytest.raises(LoopError, match="engine 1: the receipt says"):
        rig.run()


# --- failures --------------------------------------------------------------------------------------------------------


def test_group_whose_judge_failed_is_generated_again():
    class Moody(FakeScorer):
        async def score(self, texts_G, sample, previous):
            scores = await super().score(texts_G, sample, previous)
            first_time = len(self.previous[sample.sample_id]) == 1
            return ScoringFailed("judge failed: rate limit", retry=True) if first_time else scores

    rig = Rig()
    rig.scorers = [Moody(rig.scorers[0].rng)]
    rig.run()
    assert len(rig.learner.trained) == 14
    assert rig.ledger.counts()["reissued/judge failed: rate limit"] == 14


def test_judge_that_is_gone_ends_the_run_after_its_step_and_costs_no_prompt():
    class Gone(FakeScorer):
        async def score(self, texts_G, sample, previous):
            if rig.learner.version >= 2:
                raise JudgeUnavailable("judge: 'j' at http://j answered nothing")
            return await super().score(texts_G, sample, previous)

    rig = Rig()
    rig.scorers = [Gone(rig.scorers[0].rng)]
    with pytest.raises(JudgeUnavailable, match="http://j answered nothing"):
        rig.run()
    state = rig.recorder.saved[-1]
    assert state.version == rig.learner.version >= 2
    assert not state.ledger["dropped"] and not state.ledger["failures"]


def test_prompt_that_an_engine_refuses_is_dropped_and_the_run_goes_on():
    class Choosy(FakeEngine):
        async def generate(self, request):
            if request.sample_id == "p3" and not request.ticket_id.startswith("probe"):
                raise RolloutRequestError("prompt too long")
            return await super().generate(request)

    rig = Rig()
    rig.engines = [Choosy(engine.rng) for engine in rig.engines]
    rig.run()
    assert len(rig.learner.trained) == 13
    assert rig.ledger.dropped() == {"0/p3": "request refused: prompt too long"}
    assert rig.recorder.metrics[-1][1]["tickets/dropped"] == 1


def test_run_that_trained_nothing_fails():
    class Hopeless(FakeScorer):
        async def score(self, texts_G, sample, previous):
            return ScoringFailed("judge abstained: no reference", retry=False)

    rig = Rig()
    rig.scorers = [Hopeless(rig.scorers[0].rng)]
    with pytest.raises(LoopError, match="all 14 prompts were dropped: 14x judge abstained"):
        rig.run()


@pytest.mark.parametrize("part", ["engine", "update", "scorer", "learner", "publish", "probe"])
def test_death_of_any_part_ends_the_run_with_its_error(part):
    async def die(*args):
        await asyncio.sleep(0.005)
        raise ConnectionError("actor died")

    rig = Rig()
    owner, method = {
        "engine": (rig.engines[0], "generate"),
        "update": (rig.engines[0], "update_weights"),
        "scorer": (rig.scorers[0], "score"),
        "learner": (rig.learner, "train"),
        "publish": (rig.learner, "publish"),
        "probe": (rig.learner, "log_probs"),
    }[part]
    setattr(owner, method, die)
    with pytest.raises(ConnectionError, match="actor died") as caught:
        rig.run()
    assert "in the GRPO loop, while" in caught.value.__notes__[0]


def test_lost_request_is_issued_again():
    class Forgetting(FakeEngine):
        lost = False

        async def generate(self, request):
            if not self.lost and not request.ticket_id.startswith("probe"):
                Forgetting.lost = True
                await asyncio.Event().wait()
            return await super().generate(request)

    rig = Rig(lease_timeout_s=0.5)
    rig.engines = [Forgetting(engine.rng) for engine in rig.engines]
    rig.run()
    assert len(set(rig.learner.trained)) == 14
    assert rig.ledger.counts()["reissued/lease expired"] == 1


def test_cancellation_leaves_no_task_behind():
    async def interrupt(task):
        await asyncio.sleep(0.05)
        task.cancel()

    with pytest.raises(asyncio.CancelledError):
        Rig(num_prompts=500).run(beside=interrupt)


def test_groups_without_spread_are_counted():
    class Flat(FakeScorer):
        async def score(self, texts_G, sample, previous):
            scores = await super().score(texts_G, sample, previous)
            return dataclasses.replace(scores, rewards_G=np.ones_like(scores.rewards_G))

    rig = Rig()
    rig.scorers = [Flat(rig.scorers[0].rng)]
    assert rig.run().recorder.metrics[0][1]["no_spread_share"] == 1


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_dynamic_sampling_fills_batches_with_groups_that_have_spread(max_staleness):
    """A third of the prompts has no spread: it is dropped with its reason, counted, and no batch lacks a group."""

    class Flat(FakeScorer):
        async def score(self, texts_G, sample, previous):
            scores = await super().score(texts_G, sample, previous)
            if int(sample.sample_id[1:]) % 3 == 0:
                scores.rewards_G[:] = 0.7
            return scores

    rig = Rig(num_prompts=27, dynamic_sampling=True, max_staleness=max_staleness)
    rig.scorers = [Flat(rig.scorers[0].rng)]
    rig.run()
    flat = {f"0/p{i}" for i in range(0, 27, 3)}
    assert rig.ledger.dropped() == dict.fromkeys(flat, "no reward spread")
    assert sorted(rig.learner.trained) == sorted(f"0/p{i}" for i in range(27) if i % 3)
    assert [len(tickets) for _, tickets in rig.recorder.trail] == [3] * 6
    assert max(rig.learner.staleness) <= max_staleness
    values = [values for _, values in rig.recorder.metrics]
    assert {of_step["no_spread_share"] for of_step in values} == {0}
    counted = sum(of_step["groups_replaced"] for of_step in values)
    assert 0 < counted <= 9, "those after the last step are only in the ledger"
    assert values[-1]["tickets/dropped"] >= counted
