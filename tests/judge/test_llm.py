"""The LLM judge against a real HTTP server, behind a proxy that breaks calls."""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import hashlib
import json
import time

import pytest
from faulty_http import FAULTS, served
from judge_servers import SmallJudge, closeness

from sif_ray.config import ConfigError, JudgeConfig
from sif_ray.judge.client import retry_after_s
from sif_ray.judge.exact import ExactMatchJudge
from sif_ray.judge.factory import check_judge, make_judge
from sif_ray.judge.outcome import Abstained, Failed, Scored, Unavailable
from sif_ray.observe import jsonl

TIMEOUT_S = 2.0  # where a call is meant to run into it; long enough for a busy machine to answer the others
REASONS = {
    "429": "rate limit",
    "500": "HTTP 500",
    "hang": "timeout",
    "drip": "timeout",
    "cut": "connection",
    "html": "broken body",
    "schema": "broken body",
    "reset": "connection",
}


def down(reason: str, why: str = "answered nothing for judge.max_wait_s") -> Unavailable:
    """Equal to an outcome with this reason whose advice holds `why`."""

    class Advice(str):
        def __eq__(self, other: object) -> bool:
            return why in str(other) and "judge: 'judge' at http://" in str(other)

        __hash__ = str.__hash__

    return Unavailable(reason, Advice())


def audit(folder, worker="0"):
    return jsonl.read(folder / f"audit-{worker}.jsonl")


async def test_the_judge_sees_what_it_must(judging, proxy, server, photo, tmp_path):
    server.api_key = "secret-key"
    async with judging(api_key="secret-key") as judge:
        outcome = await judge.judge("Which ball?", "the red ball", "red ball", photo)
    assert outcome == Scored(closeness("the red ball", "red ball"))
    assert server.shown == [{"question": "Which ball?", "standard_answer": "the red ball", "model_answer": "red ball"}]
    assert server.images == [photo]
    [request] = server.requests
    assert request["temperature"] == 0
    score = request["response_format"]["json_schema"]["schema"]["properties"]["score"]
    assert (score["minimum"], score["maximum"]) == (0, 1)
    [line] = audit(tmp_path)
    assert line["score"] == outcome.score and line["error"] == "" and line["attempt"] == 1
    assert line["reply"] == json.dumps({"score": outcome.score})
    assert line["image_sha256"] == hashlib.sha256(photo).hexdigest()
    assert json.loads(line["prompt"]) == server.shown[0]
    assert (line["tokens_in"], line["tokens_out"]) == (100, 10)
    written = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"secret-key" not in written
    assert b"base64" not in written


async def test_without_image_none_is_sent(judging, server):
    async with judging(with_image=False) as judge:
        assert await judge.judge("q", "yes", "yes", b"no image at all") == Scored(1.0)
    assert server.images == []


def timeout_s(fault: str) -> float:
    return TIMEOUT_S if REASONS[fault] == "timeout" else 30.0


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_is_retried_and_leaves_no_trace_in_the_score(fault, judging, proxy, photo, tmp_path):
    proxy.faults = iter([fault])
    async with judging(max_retries=1, timeout_s=timeout_s(fault), max_wait_s=20) as judge:
        assert await judge.judge("q", "red ball", "blue ball", photo) == Scored(closeness("red ball", "blue ball"))
        metrics = judge.metrics()
    assert [line["error"] for line in audit(tmp_path)] == [REASONS[fault], ""]
    assert [line["score"] for line in audit(tmp_path)] == [None, closeness("red ball", "blue ball")]
    assert metrics["judge/calls"] == 2 and metrics["judge/scored"] == 1
    assert metrics.get("judge/retries", 0) == (fault != "429"), "a model that asks for patience is waited for"
    assert metrics[f"judge/error/{REASONS[fault].replace(' ', '_')}"] == 1


@pytest.mark.parametrize("fault", ["500", "hang", "cut", "html", "schema", "reset"])
async def test_retries_used_up_are_a_failure_not_a_score(fault, judging, proxy, photo):
    """Between the attempts the judge answers the ping, so it is this answer that it cannot stand."""
    proxy.faults = iter([fault, fault, None, fault])
    async with judging(max_retries=1, timeout_s=timeout_s(fault), max_wait_s=20) as judge:
        assert await judge.judge("q", "red", "red", photo) == Failed(REASONS[fault])
        assert judge.metrics()["judge/failed"] == 1
        assert await judge.judge("q", "red", "red", photo) == Scored(1.0), "a failure is not kept"


async def test_nobody_at_the_address_is_no_fault_of_the_answer(judging, photo):
    with served(SmallJudge().app()) as gone:
        pass
    async with judging(base_url=f"{gone}/v1") as judge:
        assert await judge.judge("q", "red", "red", photo) == down("connection")
        assert judge.metrics()["judge/failed"] == 1


async def test_an_outage_is_told_before_retries_are_used_up(judging, proxy, photo):
    """A judge that lets every attempt run into its time-out is not asked for longer than we wait."""
    proxy.faults = iter(["hang"] * 9)
    started_s = time.monotonic()
    async with judging(max_retries=8, timeout_s=0.5, max_wait_s=0.7) as judge:
        assert await judge.judge("q", "red", "red", photo) == down("timeout")
    assert len(proxy.arrivals) == 2 and time.monotonic() - started_s < 5


async def test_retry_after_holds_back_every_call(judging, proxy, photo):
    proxy.faults, proxy.retry_after = iter(["429"]), "1"
    async with judging(max_retries=1, max_wait_s=5) as judge:
        first = asyncio.create_task(judge.judge("q", "red", "red", photo))
        await asyncio.sleep(0.3)
        second = await judge.judge("q", "red", "blue", photo)
        assert (await first, second) == (Scored(1.0), Scored(closeness("red", "blue")))
    limited_s, *later_s = [at_s for at_s, _ in proxy.arrivals]
    assert len(later_s) == 2
    assert min(later_s) - limited_s >= 1.0


async def test_a_longer_pause_than_we_wait_is_an_outage_at_once(judging, proxy, photo):
    proxy.faults, proxy.retry_after = iter(["429"]), "3600"
    started_s = time.monotonic()
    async with judging(max_retries=5, max_wait_s=10) as judge:
        assert await judge.judge("q", "red", "red", photo) == down("rate limit")
    assert time.monotonic() - started_s < 5
    assert len(proxy.arrivals) == 1


def test_retry_after_is_a_number_or_a_date():
    soon = email.utils.format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=90))
    past = email.utils.format_datetime(datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=90))
    assert retry_after_s({"retry-after": "7"}) == 7
    assert 85 < retry_after_s({"retry-after": soon}) <= 90
    for nothing in ({}, {"retry-after": past}, {"retry-after": "soon"}, {"retry-after": "-3"}, {"retry-after": "nan"}):
        assert retry_after_s(nothing) == 0


async def test_what_no_retry_can_mend_is_not_retried(judging, proxy, server, photo):
    server.api_key = "right"
    async with judging(api_key="wrong", max_retries=5) as judge:
        assert await judge.judge("q", "red", "red", photo) == down("HTTP 401", "correct judge.api_key_env")
    assert len(proxy.arrivals) == 1


async def test_a_request_that_the_judge_refuses_is_an_abstention(judging, proxy, server, photo):
    async with judging(max_retries=5) as judge:
        assert await judge.judge("long " * 300, "red", "red", photo) == Abstained("HTTP 400")
        server.refusal = "I cannot help with that"
        assert await judge.judge("q", "red", "red", photo) == Abstained("refusal")
        server.refusal, server.finish_reason = None, "content_filter"
        assert await judge.judge("q", "red", "red", photo) == Abstained("refusal")
        assert judge.metrics()["judge/abstained"] == 3
        assert await judge.judge("q", " ", "red", photo) == Abstained("the sample has no reference answer")
    assert len(proxy.arrivals) == 3


@pytest.mark.parametrize("reply", ["I would say 0.8", "", None, '{"score": 3}'])
async def test_an_unreadable_reply_is_asked_again_and_then_a_failure(reply, judging, server, photo):
    replies = iter([reply, '{"score": 0.4}', reply, reply])
    server.reply = lambda shown: next(replies)
    async with judging(max_retries=1) as judge:
        assert await judge.judge("q", "red", "a", photo) == Scored(0.4)
        assert await judge.judge("q", "red", "b", photo) == Failed("unreadable reply")
        assert judge.metrics()["judge/breaker_opened"] == 0


async def test_a_cut_reply_is_no_score_even_if_it_looks_like_one(judging, server, photo):
    server.reply, server.finish_reason = lambda shown: "0.1", "length"
    async with judging(max_retries=0) as judge:
        assert await judge.judge("q", "red", "red", photo) == Failed("cut reply")


async def test_a_judge_that_is_down_is_left_alone_until_it_has_cooled_down(judging, proxy, photo):
    proxy.faults = iter(["500"] * 4)
    async with judging(breaker_failures=3, breaker_cooldown_s=1.0) as judge:
        for i in range(3):
            assert await judge.judge("q", "red", f"{i}", photo) == down("HTTP 500")
        started_s = time.monotonic()
        outcomes = await asyncio.gather(*(judge.judge("q", "red", f"fast {i}", photo) for i in range(20)))
        assert outcomes == [down("judge is down")] * 20
        assert time.monotonic() - started_s < 1.0
        assert len(proxy.arrivals) == 3
        await asyncio.sleep(1.05)
        outcomes = await asyncio.gather(*(judge.judge("q", "red", f"probe {i}", photo) for i in range(20)))
        assert outcomes == [down("judge is down")] * 20
        assert len(proxy.arrivals) == 4, "one of them has asked something easy"
        await asyncio.sleep(1.05)
        assert await judge.judge("q", "red", "red", photo) == Scored(1.0)
        assert judge.metrics()["judge/breaker_opened"] == 1


async def test_an_outage_shorter_than_max_wait_costs_no_answer(judging, photo):
    answers = [f"red {i}" for i in range(30)]
    with served(SmallJudge().app()) as address:
        port = int(address.rsplit(":", 1)[1])
    settings = {"base_url": f"{address}/v1", "max_retries": 3, "breaker_failures": 4, "breaker_cooldown_s": 0.05}
    async with judging(**settings, max_wait_s=20) as judge:
        started_s = time.monotonic()
        asked = [asyncio.create_task(judge.judge("q", "red", answer, photo)) for answer in answers]
        await asyncio.sleep(1.0)
        calls_while_down, seconds = judge.metrics()["judge/calls"], time.monotonic() - started_s
        assert not all(task.done() for task in asked)
        with served(SmallJudge().app(), port):
            outcomes = await asyncio.gather(*asked)
    assert calls_while_down <= 4 + 30 + seconds / 0.05, "those under way when the breaker opened, then probes"
    assert outcomes == [Scored(closeness("red", answer)) for answer in answers]


async def test_limits_are_those_of_all_workers_together(judging, server, photo):
    server.delay_s = 0.05
    async with (
        judging(max_concurrency=4, worker="0", num_workers=2) as one,
        judging(max_concurrency=4, worker="1", num_workers=2) as other,
    ):
        await asyncio.gather(
            *(
                judge.judge("q", "red", f"{name} {i}", photo)
                for name, judge in (("a", one), ("b", other))
                for i in range(8)
            )
        )
    assert server.most_at_once == 4


async def test_equal_answers_are_asked_once_and_kept(judging, proxy, server, photo, tmp_path):
    server.delay_s = 0.05
    async with judging() as judge:
        outcomes = await asyncio.gather(*(judge.judge("q", "red ball", "red", photo) for _ in range(8)))
        assert outcomes == [Scored(closeness("red ball", "red"))] * 8
        assert judge.metrics()["judge/cached"] == 7
    async with judging(worker="1") as judge:  # another worker, or the run after a restart
        assert await judge.judge("q", "red ball", "red", photo) == outcomes[0]
        assert judge.metrics()["judge/cached"] == 1
        assert len(proxy.arrivals) == 1
        different = [("other", "red ball", "red"), ("q", "red cone", "red"), ("q", "red ball", "blue")]
        await asyncio.gather(*(judge.judge(*texts, photo) for texts in different))
    async with judging(with_image=False) as judge:
        await judge.judge("q", "red ball", "red", photo)
    async with judging(model="another") as judge:
        await judge.judge("q", "red ball", "red", photo)
    assert len(proxy.arrivals) == 1 + 3 + 1 + 1
    assert [len(audit(tmp_path, worker)) for worker in "01"] == [3, 3]


async def test_an_asker_who_gives_up_does_not_take_the_answer_from_the_others(judging, server, photo):
    server.delay_s = 0.1
    async with judging() as judge:
        first = asyncio.create_task(judge.judge("q", "red", "red", photo))
        await asyncio.sleep(0.02)
        second = asyncio.create_task(judge.judge("q", "red", "red", photo))
        await asyncio.sleep(0.02)
        first.cancel()
        assert await second == Scored(1.0)
    assert len(server.requests) == 1


async def test_cost_and_latency(judging, server, photo):
    server.delay_s = 0.05
    async with judging(usd_per_million_tokens=[2.0, 30.0]) as judge:
        for i in range(3):
            await judge.judge("q", "red", f"{i}", photo)
        metrics = judge.metrics()
    assert metrics["judge/tokens_in"] == 300 and metrics["judge/tokens_out"] == 30
    assert metrics["judge/usd"] == pytest.approx(300 * 2e-6 + 30 * 30e-6)
    assert 0.05 <= metrics["judge/latency_mean_s"] <= metrics["judge/latency_p95_s"] < 5


def test_a_judge_that_cannot_work_is_refused_before_a_run(proxy, server, monkeypatch, tmp_path):
    config = JudgeConfig(kind="llm", model="judge", base_url=f"{proxy.url}/v1", api_key_env="TEST_KEY", max_retries=1)
    monkeypatch.delenv("TEST_KEY", raising=False)
    for refuse in (check_judge, lambda config: make_judge(config, tmp_path)):
        with pytest.raises(ConfigError, match=r"judge\.api_key_env = 'TEST_KEY'"):
            refuse(config)
    assert not proxy.arrivals
    monkeypatch.setenv("TEST_KEY", "right")
    server.api_key = "right"
    check_judge(config)
    assert server.shown[-1]["model_answer"] and server.images
    proxy.faults = iter(["500"])
    check_judge(config)
    proxy.faults = iter(["500", "500"])
    with pytest.raises(ConfigError, match="HTTP 500"):
        check_judge(config)
    server.reply = lambda shown: "great answer"
    with pytest.raises(ConfigError, match=r"no score.*judge\.model"):
        check_judge(config)
    monkeypatch.setenv("TEST_KEY", "wrong")
    with pytest.raises(ConfigError, match="HTTP 401"):
        check_judge(config)


def test_the_exact_judge_needs_nothing(tmp_path):
    check_judge(JudgeConfig())
    assert isinstance(make_judge(JudgeConfig(), tmp_path / "none"), ExactMatchJudge)
    assert not (tmp_path / "none").exists()
