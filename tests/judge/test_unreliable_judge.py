"""A judge that fails 30 % of its calls changes no reward value and no group silently.

Groups go through the real rewarder and the real ledger, as in the loop; their texts are made up.
"""

from __future__ import annotations

import asyncio
import io
import time

import numpy as np
import pytest
from faulty_http import at_random
from judge_servers import closeness
from PIL import Image

from sif_ray.config import RewardConfig
from sif_ray.judge.outcome import Outcome, Scored
from sif_ray.loop.ledger import Lease, Ledger
from sif_ray.loop.rewarder import GroupScores, Rewarder, ScoringFailed
from sif_ray.method import depth_code
from sif_ray.records import Sample

NUM_PROMPTS, GROUP_SIZE, GROUPS_PER_STEP = 24, 4, 4
PREVIOUS = 0.5  # the samples' answer score one epoch ago: a wrong score would change the bonus too
QUICK_FAULTS = ("429", "500", "cut", "html", "schema", "reset")
TRACE = '<think><area>[{{"bbox_2d":[0.2,0.2,0.7,0.7],"depth":0.4}}]</area><text>ball</text></think><answer>{}</answer>'


class PerfectJudge:
    """Says what the small judge says, without any network."""

    async def judge(self, question: str, answer: str, prediction: str, image: bytes) -> Outcome:
        return Scored(closeness(answer, prediction))

    def metrics(self) -> dict[str, float]:
        return {}


def texts(lease: Lease) -> list[str]:
    """What the policy wrote under a lease: other answers in every attempt."""
    return [TRACE.format(f"red ball {lease.sample_id} {lease.attempt} {i}") for i in range(GROUP_SIZE)]


@pytest.fixture
def samples(photo) -> dict[str, Sample]:
    depth = io.BytesIO()
    Image.fromarray(depth_code.encode(np.tile(np.linspace(0, 1, 64), (64, 1)))).save(depth, format="PNG")
    box = ((0.25, 0.25, 0.75, 0.75),)
    names = [f"p{i}" for i in range(NUM_PROMPTS)]
    return {
        name: Sample(
            name,
            name,
            "toy",
            "grpo",
            "Which?",
            "",
            f"ball {name}",
            box,
            64,
            64,
            photo,
            depth.getvalue(),
            "exact",
            "image",
        )
        for name in names
    }


async def train(judge, samples) -> tuple[dict[str, tuple[Lease, GroupScores]], Ledger, list[ScoringFailed]]:
    """Every group that was trained, with the lease it was generated under."""
    ledger = Ledger(
        list(samples),
        epochs=1,
        groups_per_step=GROUPS_PER_STEP,
        max_staleness=1,
        lease_timeout_s=60,
        now_s=time.monotonic,
    )
    rewarder = Rewarder(RewardConfig(), "corrected", judge)
    scored: dict[str, tuple[Lease, GroupScores]] = {}
    trained: dict[str, tuple[Lease, GroupScores]] = {}
    failures: list[ScoringFailed] = []

    async def score(lease: Lease) -> None:
        assert ledger.generated(lease, lease.version)
        result = await rewarder.score(texts(lease), samples[lease.sample_id], PREVIOUS)
        if isinstance(result, ScoringFailed):
            failures.append(result)
            assert ledger.failed(lease, result.reason, retry=result.retry)
        else:
            assert ledger.scored(lease)
            scored[lease.ticket_id] = (lease, result)

    while not ledger.done:
        leases = []
        while (lease := ledger.lease(ledger.version)) is not None:
            leases.append(lease)
        await asyncio.gather(*(score(lease) for lease in leases))
        while (batch := ledger.take_batch()) is not None:
            trained |= {ticket_id: scored[ticket_id] for ticket_id in batch.ticket_ids}
            ledger.trained(batch)
    return trained, ledger, failures


async def perfect(lease: Lease, sample: Sample) -> GroupScores:
    scores = await Rewarder(RewardConfig(), "corrected", PerfectJudge()).score(texts(lease), sample, PREVIOUS)
    assert isinstance(scores, GroupScores)
    return scores


@pytest.mark.parametrize("max_retries", [1, 10])
async def test_thirty_percent_of_failed_calls_change_no_reward(max_retries, judging, proxy, samples):
    proxy.faults = at_random(0.3, seed=7, kinds=QUICK_FAULTS)
    async with judging(max_retries=max_retries, max_wait_s=20) as judge:
        trained, ledger, failures = await train(judge, samples)
        metrics = judge.metrics()
    faults = [fault for _, fault in proxy.arrivals if fault]
    assert 0.15 < len(faults) / len(proxy.arrivals) < 0.45

    for lease, scores in trained.values():
        expected = await perfect(lease, samples[lease.sample_id])
        np.testing.assert_array_equal(scores.rewards_G, expected.rewards_G)
        for term, values_G in expected.terms_G.items():
            np.testing.assert_array_equal(scores.terms_G[term], values_G, err_msg=term)
        assert 0 < expected.terms_G["answer_score"].min() < 1, "a score of 0 would show"

    counts, dropped = ledger.counts(), ledger.dropped()
    assert trained.keys() | dropped.keys() == {f"0/{name}" for name in samples}
    assert not trained.keys() & dropped.keys()
    assert (counts["trained"], counts["dropped"]) == (len(trained), len(dropped))
    reissued = sum(count for name, count in counts.items() if name.startswith("reissued/judge failed: "))
    assert reissued + len(dropped) == len(failures), "every failure is counted once"
    assert all(reason.startswith("judge failed: ") for reason in dropped.values())
    assert sum(value for name, value in metrics.items() if name.startswith("judge/error/")) == len(faults)
    if max_retries > 1:
        assert not failures and 0 < metrics["judge/retries"] <= len(faults)
    else:
        assert failures and trained and metrics["judge/failed"] >= len(failures)
