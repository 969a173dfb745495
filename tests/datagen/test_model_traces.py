"""Traces of a chat model against a real HTTP server, behind a proxy that breaks calls."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from faulty_http import FaultyProxy, at_random, served
from judge_servers import SmallJudge
from PIL import Image
from teacher_servers import Shown, SmallTeacher, trace_of, well_behaved, wrong_numbers
from toy_drafts import toy_drafts

from sif_ray.config import ConfigError, GenerateConfig, JudgeConfig, TeacherConfig, load
from sif_ray.datagen.chat_teacher import TeacherUnavailable, check_teacher, framed_photos
from sif_ray.datagen.checks import EXPLANATIONS, form_faults
from sif_ray.datagen.drafts import Draft
from sif_ray.datagen.model_traces import ModelTraces, log_folder
from sif_ray.datagen.traces import TemplateTraces
from sif_ray.depth.encoding import read_gray
from sif_ray.judge import caller
from sif_ray.judge.exact import ExactMatchJudge
from sif_ray.method.boxes import FULL_IMAGE
from sif_ray.method.trace import parse
from sif_ray.observe import jsonl

CONFIG = GenerateConfig(splits={"train": 12})
QUICK_FAULTS = ("429", "500", "cut", "html", "schema", "reset")
TIMEOUT_S = 1.0  # where a call is meant to run into it


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caller, "FIRST_PAUSE_S", 0.01)


@pytest.fixture(scope="module")
def drafts() -> list[Draft]:
    return toy_drafts(CONFIG)


@pytest.fixture
def server() -> SmallTeacher:
    return SmallTeacher()


@pytest.fixture
def proxy(server: SmallTeacher) -> Iterator[FaultyProxy]:
    """In front of `server`; its address is `proxy.url`."""
    with served(server.app()) as upstream:
        proxy = FaultyProxy(upstream)
        with served(proxy.app()) as proxy.url:
            yield proxy


@pytest.fixture
def teaching(proxy: FaultyProxy, tmp_path: Path) -> Callable[..., contextlib.AbstractAsyncContextManager[ModelTraces]]:
    """`async with teaching(max_retries=0) as traces`: the changes are those of `config.teacher`."""

    @contextlib.asynccontextmanager
    async def make(*, judge: JudgeConfig | None = None, **changes) -> AsyncIterator[ModelTraces]:
        settings = {"model": "teacher", "base_url": f"{proxy.url}/v1", "breaker_cooldown_s": 0.05, "max_wait_s": 20.0}
        teacher = TeacherConfig(kind="llm", **settings | changes)
        traces = ModelTraces(replace(CONFIG, output=str(tmp_path), teacher=teacher, judge=judge or JudgeConfig()))
        try:
            yield traces
        finally:
            await traces.close()

    return make


def audit(folder: Path) -> list[dict]:
    return [line for file in (folder / "teacher").glob("audit-*.jsonl") for line in jsonl.read(file)]


def about(draft: Draft) -> Callable[[Shown], bool]:
    """Whether a request is about this draft: its frames are drawn for its sample."""
    (framed,) = TemplateTraces(CONFIG)([draft])
    wanted = (framed.sample.question, [list(frame) for frame in framed.sample.frames])
    return lambda shown: (shown.question, [frame_boxes(area) for area in shown.areas]) == wanted


def frame_boxes(area: str) -> list[tuple[float, ...]]:
    return [tuple(box["bbox_2d"]) for box in json.loads(area)]


def assert_right(draft: Draft, original: Draft) -> None:
    assert draft.reasons == ()
    (framed,) = TemplateTraces(CONFIG)([original])
    assert replace(draft.sample, trace="") == replace(framed.sample, trace="")
    assert form_faults(draft.sample, read_gray(draft.depth_gray), CONFIG.decimals) == []
    sample = draft.sample
    assert ExactMatchJudge().same(sample.question, sample.answer, parse(sample.trace).answer)


# --- what the teacher is asked ---------------------------------------------------------------------------------------


def greenness(photo: np.ndarray) -> np.ndarray:
    levels = photo.astype(int)
    return levels[..., 1] - levels[..., [0, 2]].max(axis=-1)


async def test_the_teacher_is_shown_the_frames_in_forward_order(teaching, server, drafts):
    async with teaching(temperature=0.7, max_tokens=999) as traces:
        made = await traces(drafts)
    for draft, original in zip(made, drafts, strict=True):
        assert_right(draft, original)
        [index] = [index for index, shown in enumerate(server.shown) if about(original)(shown)]
        shown, request = server.shown[index], server.requests[index]
        assert (shown.question, shown.answer) == (original.sample.question, original.sample.answer)
        assert frame_boxes(shown.areas[0]) == [FULL_IMAGE]
        assert len(shown.photos) == len(draft.sample.frames), "the depth image is not shown"
        for area, photo in zip(shown.areas, shown.photos, strict=True):
            assert photo.shape == (112, 112, 3)
            for x1, y1, x2, y2 in frame_boxes(area):
                left, top, right, bottom = (round(value * 112) for value in (x1, y1, x2, y2))
                edges = (np.s_[top : top + 2, left:right], np.s_[bottom - 2 : bottom, left:right])
                edges += (np.s_[top:bottom, left : left + 2], np.s_[top:bottom, right - 2 : right])
                assert all(greenness(photo)[edge].mean() > 60 for edge in edges)
        assert (request["model"], request["temperature"], request["max_tokens"]) == ("teacher", 0.7, 999)
    assert len({request["seed"] for request in server.requests}) == len(drafts)
    seeds = sorted(request["seed"] for request in server.requests)
    server.requests.clear()
    async with teaching() as traces:
        assert await traces(drafts) == made
    assert sorted(request["seed"] for request in server.requests) == seeds, "a restart asks for the same"


def test_the_boxes_are_drawn_in_green_just_inside_their_edges():
    buffer = io.BytesIO()
    Image.new("RGB", (640, 480), (120, 90, 140)).save(buffer, "PNG")
    frames = [[FULL_IMAGE], [(0.1, 0.2, 0.35, 0.8), (0.5, 0.5, 0.75, 0.75)]]
    whole, two = framed_photos(buffer.getvalue(), frames)
    for encoded, boxes_px in ((whole, [(0, 0, 640, 480)]), (two, [(64, 96, 224, 384), (320, 240, 480, 360)])):
        with Image.open(io.BytesIO(encoded)) as opened:
            assert (opened.format, opened.size) == ("JPEG", (640, 480))
            green = greenness(np.asarray(opened)) > 60
        expected = np.zeros_like(green)
        for x1, y1, x2, y2 in boxes_px:
            expected[y1:y2, x1:x2] = True
            expected[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2] = False
        assert (green & expected).sum() > 0.95 * expected.sum()
        assert (green & ~expected).sum() < 0.05 * expected.sum()


def test_a_large_photograph_is_reduced():
    buffer = io.BytesIO()
    Image.new("L", (5000, 2500)).save(buffer, "JPEG")
    [photo] = framed_photos(buffer.getvalue(), [[FULL_IMAGE]])
    assert Image.open(io.BytesIO(photo)).size == (2048, 1024)


async def test_drafts_that_cannot_have_a_trace_are_not_shown(teaching, server, drafts):
    sample = drafts[0].sample
    changes = [
        {"question": " "},
        {"answer": ""},
        {"boxes": ((0.5, 0.5, 0.4, 0.6),)},
        {"boxes": ((0.5, 0.5, 1.4, 0.6),)},
    ]
    bad = [replace(drafts[0], sample=replace(sample, **change)) for change in changes]
    refused = drafts[0].refused("image_unreadable")
    async with teaching() as traces:
        made = await traces([refused, *bad])
    assert made[0] == refused
    assert [draft.reasons for draft in made[1:]] == [
        ("question_empty",),
        ("answer_empty",),
        ("boxes_invalid",),
        ("boxes_invalid",),
    ]
    assert server.shown == []


# --- what it replies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    ["```\n{}\n```", "```xml\n{}```", "{}", "  {}\n", "Here it is:\n```\n{}\n```\nAnything else?", "```{}"],
)
async def test_forms_of_a_reply(form, teaching, server, drafts):
    server.reply = lambda shown: form.format(trace_of(shown).replace("<text>", "\n<text> "))
    async with teaching(repairs=0) as traces:
        made = await traces(drafts[:2])
    for draft, original in zip(made, drafts, strict=False):
        assert_right(draft, original)
        assert draft.sample.trace == parse(draft.sample.trace).render()
        assert "`" not in draft.sample.trace


FAULTY_REPLIES = {
    "trace_no_think": lambda shown: "I would rather not.",
    "trace_text_empty": lambda shown: trace_of(shown).replace("Look 0 at the photo.", " "),
    "boxes_not_schedule": lambda shown: trace_of(replace(shown, areas=[shown.areas[0], *shown.areas[:0:-1]])),
    "last_boxes_not_evidence": lambda shown: trace_of(replace(shown, areas=shown.areas[:-1])),
    "depth_not_box_mean": lambda shown: trace_of(replace(shown, areas=[*map(wrong_numbers, shown.areas)])),
    "answer_not_truth": lambda shown: trace_of(replace(shown, answer="elephant")),
}


@pytest.mark.parametrize("reason", FAULTY_REPLIES)
async def test_a_faulty_reply_is_repaired_once_or_refused(reason, teaching, server, drafts):
    faulty = FAULTY_REPLIES[reason]
    server.reply = lambda shown: well_behaved(shown) if shown.complaints else faulty(shown)
    async with teaching() as traces:
        made = await traces(drafts[:3])
        assert traces.metrics()["teacher/repairs"] == traces.metrics()["teacher/accepted"] == 3
    for draft, original in zip(made, drafts, strict=False):
        assert_right(draft, original)
    for shown, request in zip(server.shown, server.requests, strict=True):
        if shown.complaints:
            assert EXPLANATIONS[reason] in shown.complaints[0]
            assert request["messages"][2] == {"role": "assistant", "content": faulty(shown)}

    server.reply = faulty
    asked = len(server.requests)
    async with teaching() as traces:
        [refused] = await traces(drafts[:1])
        assert traces.metrics()["teacher/refused"] == 1
    assert reason in refused.reasons
    assert refused.sample.trace == faulty(server.shown[-1]), "a refused row keeps the last reply as it came"
    assert len(server.requests) - asked == 2


async def test_a_cut_reply_is_refused_even_if_it_looks_whole(teaching, server, drafts):
    server.finish_reason = lambda shown: "length"
    async with teaching(repairs=0) as traces:
        [refused] = await traces(drafts[:1])
    assert refused.reasons == ("teacher_cut",)


async def test_an_answer_in_other_words_is_the_truth(teaching, server, drafts):
    server.reply = lambda shown: trace_of(replace(shown, answer=f"The {shown.answer.upper()}."))
    async with teaching(repairs=0) as traces:
        made = await traces(drafts)
    for draft, original in zip(made, drafts, strict=True):
        assert_right(draft, original)


@pytest.mark.parametrize("kind", ["refusal", "content_filter", "HTTP 400"])
async def test_a_refusal_costs_one_row(kind, teaching, server, drafts):
    is_bad = about(drafts[1])
    if kind == "refusal":
        server.refusal = lambda shown: "I cannot help with that" if is_bad(shown) else None
    elif kind == "content_filter":
        server.finish_reason = lambda shown: "content_filter" if is_bad(shown) else "stop"
    else:
        server.status = lambda shown: 400 if is_bad(shown) else 200
    async with teaching() as traces:
        made = await traces(drafts[:3])
    assert [draft.reasons for draft in made] == [(), ("teacher_refusal",), ()]
    assert sum(map(is_bad, server.shown)) == 1


@pytest.mark.parametrize("num_rows", [1, 4], ids=["alone", "among others"])
@pytest.mark.parametrize(
    ("reason", "max_retries"), [("teacher_timeout", 1), ("teacher_failed", 0), ("teacher_failed", 4)]
)
async def test_a_row_that_breaks_the_teacher_costs_one_row_and_no_outage(
    reason, max_retries, num_rows, teaching, server, drafts
):
    is_bad = about(drafts[0])
    if reason == "teacher_timeout":
        server.seconds = lambda shown: 30.0 if is_bad(shown) else 0.0
    else:
        server.status = lambda shown: 500 if is_bad(shown) else 200
    async with teaching(max_retries=max_retries, timeout_s=TIMEOUT_S) as traces:
        made = await traces(drafts[:num_rows])
    assert [draft.reasons for draft in made] == [(reason,)] + [()] * (num_rows - 1)


# --- what the endpoint does ------------------------------------------------------------------------------------------


async def test_rows_that_all_break_the_teacher_are_refused_in_the_end(teaching, server, drafts):
    server.status = lambda shown: 200 if shown.is_easy else 500
    async with teaching(max_retries=1) as traces:
        made = await traces(drafts[:8])
    assert [draft.reasons for draft in made] == [("teacher_failed",)] * 8


async def test_failing_calls_lose_no_row(teaching, proxy, drafts):
    proxy.faults = at_random(0.3, seed=5, kinds=QUICK_FAULTS)
    async with teaching(max_retries=15) as traces:
        made = await traces(drafts)
        errors = sum(count for name, count in traces.metrics().items() if name.startswith("teacher/error/"))
    assert errors > 3
    for draft, original in zip(made, drafts, strict=True):
        assert_right(draft, original)


async def test_patience_is_no_retry(teaching, proxy, drafts):
    proxy.faults, proxy.retry_after = iter(["429"] * 12), "0.1"
    async with teaching(max_retries=0) as traces:
        made = await traces(drafts[:4])
    assert [draft.reasons for draft in made] == [()] * 4
    asked_s = [at_s for at_s, fault in proxy.arrivals if not fault]
    assert min(asked_s) - proxy.arrivals[0][0] >= 0.1


async def test_an_outage_costs_nothing_but_time(teaching, server, drafts):
    with served(server.app()) as address:
        port = int(address.rsplit(":", 1)[1])
    async with teaching(base_url=f"{address}/v1", max_retries=1) as traces:
        asked = asyncio.create_task(traces(drafts))
        await asyncio.sleep(1.5)
        assert not asked.done()
        with served(server.app(), port):
            made = await asked
        assert traces.metrics()["teacher/error/connection"] > 2
    for draft, original in zip(made, drafts, strict=True):
        assert_right(draft, original)


@pytest.mark.parametrize("fault", ["429", "500", "hang"])
async def test_a_longer_outage_stops_the_run_and_refuses_nothing(fault, teaching, proxy, drafts):
    proxy.faults, proxy.retry_after = iter([fault] * 1000), "0.05"
    async with teaching(max_retries=1, max_wait_s=0.5, timeout_s=TIMEOUT_S) as traces:
        with pytest.raises(TeacherUnavailable, match=r"teacher\.max_wait_s = 0\.5 s .*nothing is lost"):
            await traces(drafts)
        proxy.faults = iter(())
        assert [draft.reasons for draft in await traces(drafts[:3])] == [()] * 3


async def test_a_pause_longer_than_our_patience_stops_the_run_at_once(teaching, proxy, drafts):
    proxy.faults, proxy.retry_after = iter(["429"] * 100), "3600"
    started_s = time.monotonic()
    async with teaching() as traces:
        with pytest.raises(TeacherUnavailable, match="rate limit"):
            await traces(drafts)
    assert time.monotonic() - started_s < 10


async def test_the_key_comes_from_the_environment_and_stays_out_of_logs(
    teaching, server, drafts, tmp_path, monkeypatch
):
    server.api_key = "secret-key"
    monkeypatch.delenv("TEST_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"teacher\.api_key_env = 'TEST_KEY'"):
        async with teaching(api_key_env="TEST_KEY"):
            pass
    monkeypatch.setenv("TEST_KEY", "secret-key")
    async with teaching(api_key_env="TEST_KEY") as traces:
        assert [draft.reasons for draft in await traces(drafts[:2])] == [(), ()]
    monkeypatch.setenv("TEST_KEY", "wrong-key")
    async with teaching(api_key_env="TEST_KEY") as traces:
        with pytest.raises(TeacherUnavailable, match=r"HTTP 401: .*teacher\.api_key_env") as caught:
            await traces(drafts[:2])
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    told = " ".join(str(error) for error in (caught.value, caught.value.__cause__))
    for key in ("secret-key", "wrong-key"):
        assert key.encode() not in written and key not in told


def test_a_teacher_that_cannot_work_is_refused_before_a_run(proxy, server, monkeypatch):
    teacher = TeacherConfig(
        kind="llm", model="teacher", base_url=f"{proxy.url}/v1", api_key_env="TEST_KEY", max_retries=1
    )
    server.api_key = "secret-key"
    monkeypatch.setenv("TEST_KEY", "wrong-key")
    with pytest.raises(ConfigError, match=r"teacher: 'teacher' at .*HTTP 401"):
        check_teacher(teacher)
    monkeypatch.setenv("TEST_KEY", "secret-key")
    proxy.faults = iter(["500"])
    check_teacher(teacher)
    proxy.faults = iter(["500", "500"])
    with pytest.raises(ConfigError, match="HTTP 500"):
        check_teacher(teacher)
    assert server.shown == [], "it is asked something easy"


async def test_the_audit_log_has_every_attempt(teaching, proxy, server, drafts, tmp_path):
    proxy.faults = iter(["500"])
    server.reply = lambda shown: well_behaved(shown) if shown.complaints else "no"
    async with teaching(usd_per_million_tokens=[2.0, 10.0]) as traces:
        await traces(drafts[:1])
        metrics = traces.metrics()
    failed, first, second = audit(tmp_path)
    assert (failed["error"], first["error"], second["error"]) == ("HTTP 500", "", "")
    assert (first["attempt"], first["reply"], second["reply"]) == (2, "no", well_behaved(server.shown[1]))
    assert {line["sample_id"] for line in (failed, first, second)} == {drafts[0].sample.sample_id}
    assert len(first["images_sha256"]) == len(server.shown[0].photos)
    assert second["prompt"][-1] == server.shown[1].complaints[0]
    assert "base64" not in json.dumps(audit(tmp_path))
    assert metrics["teacher/usd"] == pytest.approx(2 * (1000 * 2e-6 + 100 * 10e-6))


def test_logs_of_an_object_store_are_on_the_node():
    assert log_folder("runs/data") == Path("runs/data")
    assert log_folder("s3://bucket/data").is_absolute()
    assert log_folder("s3://bucket/data") != log_folder("s3://bucket/other")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (["kind=llm", "base_url=http://h/v1", "max_concurrency=3", "actors_max=4"], r"actors_max \(4\) is above"),
        (["kind=vllm", "max_tokens=4096"], r"max_tokens \(4096\) leaves no room .*engine\.max_model_len \(4096\)"),
    ],
)
def test_a_teacher_that_contradicts_itself_is_refused(settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        load("generate", None, [f"teacher.{setting}" for setting in ["model=teacher", *settings]])


async def test_limits_are_those_of_all_actors_and_calls_together(teaching, server, drafts):
    server.seconds = lambda shown: 0.05
    settings = {"max_concurrency": 6, "actors_max": 2}
    async with teaching(**settings) as one, teaching(**settings) as other:
        await asyncio.gather(one(drafts[:8]), one(drafts[8:16]), other(drafts[:8]), other(drafts[8:16]))
    assert server.most_at_once == 6


async def test_a_slow_reply_holds_up_its_own_shard_only(teaching, server, drafts):
    is_slow = about(drafts[0])
    server.seconds = lambda shown: 3.0 if is_slow(shown) else 0.0
    async with teaching(max_concurrency=4) as traces:
        first = asyncio.create_task(traces(drafts[:5]))
        await asyncio.wait_for(traces(drafts[5:15]), 2.5)
        assert not first.done()
        assert [draft.reasons for draft in await first] == [()] * 5


# --- who says whether the answer is true -----------------------------------------------------------------------------


async def test_an_llm_judge_says_whether_the_answer_is_true(teaching, server, drafts, tmp_path):
    judge_server = SmallJudge()
    server.reply = lambda shown: trace_of(replace(shown, answer=f"something like {shown.answer}"))
    with served(judge_server.app()) as address:
        judge = JudgeConfig(kind="llm", model="judge", base_url=f"{address}/v1", max_retries=0, max_wait_s=0)
        async with teaching(judge=judge, repairs=0) as traces:
            judge_server.reply = lambda shown: '{"score": 0.9}'
            [accepted] = await traces(drafts[:1])
            judge_server.reply = lambda shown: '{"score": 0.3}'
            [refused] = await traces(drafts[1:2])
            judge_server.reply = lambda shown: "hm"
            [unjudged] = await traces(drafts[2:3])
            judge_server.refusal = "no"
            [abstained] = await traces(drafts[3:4])
    reasons = [draft.reasons for draft in (accepted, refused, unjudged, abstained)]
    assert reasons == [(), ("answer_not_truth",), ("answer_not_judged",), ("answer_not_judged",)]
    assert judge_server.shown[0]["standard_answer"] == drafts[0].sample.answer
    assert judge_server.shown[0]["model_answer"] == f"something like {drafts[0].sample.answer}"
    async with teaching(judge=replace(judge, max_retries=0), repairs=0) as traces:
        with pytest.raises(TeacherUnavailable, match="judge"):  # it is gone
            await traces(drafts[4:5])
