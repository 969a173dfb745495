"""Evaluation beside the training: every token of one version, the loop goes on, nothing is reported by halves."""

from __future__ import annotations

import asyncio
import logging

import numpy as np
import pytest
from loop_fakes import FakeEngine, FakeScorer, MortalEngine, Rig

from sif_ray.loop.evaluation import choose
from sif_ray.loop.requests import VersionError
from sif_ray.loop.rewarder import GroupScores, ScoringFailed
from sif_ray.rollout.errors import RolloutRequestError


class VersionScorer(FakeScorer):
    """Held-out answers are worth what the test's engines wrote into their text: the version of their first token."""

    async def score(self, texts_G, sample, previous):
        scores = await super().score(texts_G, sample, previous)
        if len(texts_G) > 1:
            return scores
        worth_1 = np.array([float(texts_G[0])], np.float32)
        return GroupScores(worth_1, dict.fromkeys(scores.terms_G, worth_1))


class SlowAnswers(FakeEngine):
    """Held-out answers take several training steps, and their text is the version that they are of."""

    answer_s = 0.15

    async def generate(self, request):
        is_eval = request.ticket_id.startswith("eval")
        if is_eval:
            assert request.num_rollouts == 1 and request.sampling.temperature == 0 and request.urgent
            first = self.version
            await asyncio.sleep(self.answer_s)
            assert self.version == first, "the engine was updated while it was lent"
        group = await super().generate(request)
        if is_eval:
            for rollout in group.rollouts:
                object.__setattr__(rollout, "text", str(group.oldest_version))
        return group


def evaluated(rig: Rig) -> list[tuple[int, dict[str, float]]]:
    return [(step, values) for step, values in rig.recorder.metrics if "eval/version" in values]


def make_rig(**changes) -> Rig:
    rig = Rig(**({"num_prompts": 60, "eval_every": 4, "max_staleness": 2} | changes))
    rig.eval_samples = [rig.samples[f"p{i}"] for i in range(6)]
    rig.engines = [SlowAnswers(engine.rng) for engine in rig.engines]
    rig.scorers = [VersionScorer(rig.scorers[0].rng)]
    return rig


@pytest.mark.parametrize("num_engines", [1, 2])
@pytest.mark.parametrize("max_staleness", [0, 2])
def test_answers_are_of_one_version_and_training_goes_on(num_engines, max_staleness):
    rig = make_rig(num_engines=num_engines, max_staleness=max_staleness).run()
    assert len(set(rig.learner.trained)) == 60 and max(rig.learner.staleness) <= max_staleness
    found = evaluated(rig)
    versions = [values["eval/version"] for _, values in found]
    assert versions[0] == 0 and versions[-1] == 20 and all(version % 4 == 0 for version in versions)
    for step, values in found:
        assert values["eval/total"] == values["eval/box"] == values["eval/version"] <= step
        assert values["eval/refused"] == 0
    if num_engines == 2:
        assert any(values["eval/version"] < step - 1 for step, values in found), "the loop has waited for it"
    lent = [request.ticket_id for engine in rig.engines for request in engine.requests if "eval" in request.ticket_id]
    assert len(lent) == len(set(lent)) == 6 * len(versions)


def test_evaluation_leaves_training_as_it_is():
    """Strictly on-policy with one engine, the same groups are trained in the same steps with and without."""
    with_it, without = (
        make_rig(max_staleness=0, num_engines=1, num_prompts=20),
        make_rig(max_staleness=0, num_engines=1, num_prompts=20, eval_every=0),
    )
    steps = [{version: sorted(tickets) for version, tickets in rig.run().recorder.trail} for rig in (with_it, without)]
    assert steps[0] == steps[1] and evaluated(with_it) and not evaluated(without)


def test_evaluation_of_a_dead_engine_goes_to_another_one_that_holds_the_version(caplog):
    class Dies(MortalEngine):
        async def generate(self, request):
            if request.ticket_id.startswith("eval"):
                self.life.die()
            return await super().generate(request)

    rig = make_rig(num_prompts=6, eval_every=100, max_staleness=0, slow_s=0.05)
    healthy = rig.engines[1]
    rig.engines = [Dies(healthy.rng, 0.05), healthy]
    start = rig.engine_factory.start

    async def first_one_first(name):
        if name == "engine 1":
            await asyncio.sleep(0.1)
        return await start(name)

    rig.engine_factory.start = first_one_first
    rig.engine_factory.make = lambda: SlowAnswers(healthy.rng)
    with caplog.at_level(logging.WARNING):
        rig.run()
    assert "engine 0 is lost" in caplog.text
    assert [values["eval/version"] for _, values in evaluated(rig)] == [0, 2]
    assert len(set(rig.learner.trained)) == 6


def test_evaluation_whose_version_is_gone_is_given_up_and_said_so(caplog):
    class DiesWhenTheOtherIsAhead(MortalEngine):
        async def generate(self, request):
            if request.ticket_id.startswith("eval/4/"):
                while rig.learner.version < 6:
                    await asyncio.sleep(0.001)
                self.life.die()
            group = await super().generate(request)
            for rollout in group.rollouts:
                object.__setattr__(rollout, "text", str(group.oldest_version))
            return group

    rig = make_rig()
    rig.engines = [DiesWhenTheOtherIsAhead(engine.rng) for engine in rig.engines]
    rig.engine_factory.make = lambda: DiesWhenTheOtherIsAhead(rig.learner.rng)
    with caplog.at_level(logging.WARNING):
        rig.run()
    assert "the evaluation of version 4 is given up: no engine holds it any more" in caplog.text
    assert 4 not in [values["eval/version"] for _, values in evaluated(rig)]
    assert len(set(rig.learner.trained)) == 60


def test_samples_without_answer_or_verdict_are_counted_and_left_out():
    class Choosy(SlowAnswers):
        answer_s = 0.0

        async def generate(self, request):
            if request.ticket_id.endswith("/p1") and request.ticket_id.startswith("eval"):
                raise RolloutRequestError("prompt too long")
            return await super().generate(request)

    class Moody(VersionScorer):
        async def score(self, texts_G, sample, previous):
            if len(texts_G) == 1 and sample.sample_id == "p2":
                return ScoringFailed("judge abstained", retry=False)
            return await super().score(texts_G, sample, previous)

    rig = make_rig(num_prompts=12)
    rig.engines = [Choosy(engine.rng) for engine in rig.engines]
    rig.scorers = [Moody(rig.scorers[0].rng)]
    rig.run()
    for _, values in evaluated(rig):
        assert values["eval/refused"] == 2 and values["eval/total"] == values["eval/version"]


def test_engine_that_breaks_its_promise_ends_the_run():
    class Liar(FakeEngine):
        async def generate(self, request):
            if request.ticket_id.startswith("eval/4/"):
                self.version = 3
            group = await super().generate(request)
            for rollout in group.rollouts:
                object.__setattr__(rollout, "text", "0")
            return group

    rig = make_rig(num_engines=1, parity_every=100)
    rig.engines = [Liar(rig.engines[0].rng)]
    with pytest.raises(VersionError, match=r"evaluation of version 4, sample p\d: tokens are of versions 3 to 3"):
        rig.run()


def test_chosen_samples_are_the_same_every_time_and_no_more_than_there_are():
    samples = {f"p{i}": object() for i in range(20)}
    shuffled = dict(reversed(samples.items()))
    assert choose(samples, 5, seed=1) == choose(shuffled, 5, seed=1) != choose(samples, 5, seed=2)
    assert len(set(map(id, choose(samples, 99, seed=0)))) == 20
