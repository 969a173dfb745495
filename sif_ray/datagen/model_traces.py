"""Traces that a chat model writes, checked before they are taken."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sif_ray.config import GenerateConfig
from sif_ray.datagen.chat_teacher import ChatTeacher, Message, RowRefused, TeacherUnavailable, lesson, repair
from sif_ray.datagen.checks import form_faults
from sif_ray.datagen.drafts import Draft
from sif_ray.datagen.traces import areas_of, sample_rng, with_frames
from sif_ray.datagen.vllm_server import VllmServer
from sif_ray.depth.encoding import read_gray
from sif_ray.judge.factory import make_judge
from sif_ray.judge.outcome import Scored, Unavailable
from sif_ray.method.trace import TraceError, find_answer, parse
from sif_ray.records import Sample

SAME_ANSWER = 0.8
"""Least score with which a judge takes the teacher's answer for the truth; the exact judge gives 0 or 1."""


class ModelTraces:
    """Traces by a chat model: that of an endpoint (kind "llm"), or one that this object serves itself with vLLM in
    processes that end with its own (kind "vllm"). For one event loop; calls may overlap and share the limits.

    A reply is taken if it passes `checks.form_faults` and the configured judge takes its answer for the truth. One that
    does not is shown to the teacher again with what is wrong, `teacher.repairs` times; then the row is refused, and its
    trace is the last reply.

    Example: `await ModelTraces(config)(drafts)`.
    """

    def __init__(self, config: GenerateConfig) -> None:
        """Open the teacher; one of the kind "vllm" loads its model, which takes a minute or more.

        Logs, and the cache of an LLM judge, are in `log_folder(config.output)`, one log per process. Raises
        `ConfigError` when the environment lacks a key, `RuntimeError` when vLLM does not start.
        """
        self._config = config
        teacher = config.teacher
        logs, worker = log_folder(config.output), f"{socket.gethostname()}-{os.getpid()}"
        self._server: VllmServer | None = None
        if teacher.kind == "vllm":
            self._server = VllmServer(teacher.model, teacher.engine, logs / "teacher" / f"vllm-{worker}.log")
            teacher = replace(teacher, base_url=self._server.base_url, api_key_env="")
        self._teacher = ChatTeacher(teacher, logs / "teacher" / f"audit-{worker}.jsonl")
        self._judge = make_judge(config.judge, logs / "judge", worker, teacher.actors_max)
        # Twice the calls in flight: rows are made ready while others are under way, but not all of them at once.
        self._seats = asyncio.Semaphore(2 * max(1, teacher.max_concurrency // teacher.actors_max))

    async def __call__(self, drafts: list[Draft]) -> list[Draft]:
        """The drafts in their order, with frames and trace or with reasons; refused ones are left as they are.

        Raises `TeacherUnavailable` when teacher or judge cannot be asked, which refuses no row.
        """
        traced = asyncio.create_task(self._traced(drafts))
        end = [asyncio.create_task(self._server.end())] if self._server else []
        try:
            await asyncio.wait([traced, *end], return_when=asyncio.FIRST_COMPLETED)
            for ended in filter(asyncio.Task.done, end):
                raise TeacherUnavailable(f"teacher: {ended.result()}; start the run again, nothing is lost")
            return await traced
        finally:
            for task in [traced, *end]:
                task.cancel()

    def metrics(self) -> dict[str, float]:
        """Totals of teacher and judge: teacher/accepted, /refused, /repairs, and those of their calls."""
        return self._teacher.metrics() | self._judge.metrics()

    async def close(self) -> None:
        """Close connections and logs, and end a server of our own."""
        await self._teacher.close()
        await self._judge.close()
        if self._server:
            await asyncio.to_thread(self._server.close)

    async def _traced(self, drafts: list[Draft]) -> list[Draft]:
        rows = [asyncio.create_task(self._trace(draft)) for draft in drafts]
        try:
            return await asyncio.gather(*rows)
        finally:
            for row in rows:
                row.cancel()

    async def _trace(self, draft: Draft) -> Draft:
        draft = with_frames(draft, self._config)
        if draft.reasons:
            return draft
        async with self._seats:
            draft = await self._taught(draft)
        self._teacher.meter.count("refused" if draft.reasons else "accepted")
        return draft

    async def _taught(self, draft: Draft) -> Draft:
        sample = draft.sample
        depth_rel, messages = await asyncio.to_thread(self._lesson, draft)
        seed = int(sample_rng(self._config.seed, sample.sample_id).integers(2**31))
        for repairs_left in reversed(range(1 + self._config.teacher.repairs)):
            try:
                completion = await self._teacher.reply(messages, sample.sample_id, seed)
                sample = replace(sample, trace=rendered(completion.text, sample.profile, self._config.decimals))
                cut = completion.finish_reason == "length"
                reasons = ["teacher_cut"] if cut else await self._faults(sample, depth_rel)
            except RowRefused as error:
                return replace(draft, sample=sample).refused(error.reason)
            if not reasons:
                break
            sample = replace(sample, trace=completion.text)
            if repairs_left:
                self._teacher.meter.count("repairs")
                messages = repair(messages, completion.text, reasons)
        return replace(draft, sample=sample).refused(*reasons)

    def _lesson(self, draft: Draft) -> tuple[npt.NDArray[np.float64], list[Message]]:
        depth_rel = read_gray(draft.depth_gray)
        areas = areas_of(draft.sample.frames, depth_rel)
        return depth_rel, lesson(draft.sample, areas, self._config.decimals)

    async def _faults(self, sample: Sample, depth_rel: npt.NDArray[np.float64]) -> list[str]:
        found = form_faults(sample, depth_rel, self._config.decimals)
        if found:
            return found
        answer = find_answer(sample.trace) or ""
        outcome = await self._judge.judge(sample.question, sample.answer, answer, sample.image)
        if isinstance(outcome, Scored):
            return [] if outcome.score >= SAME_ANSWER else ["answer_not_truth"]
        if isinstance(outcome, Unavailable):
            raise TeacherUnavailable(f"{outcome.advice}; start the run again once it answers, nothing is lost")
        raise RowRefused("answer_not_judged")


def rendered(reply: str, profile: str, decimals: int) -> str:
    """The trace in a reply, fenced by backticks or bare, in the one form that traces are stored in; what holds no trace
    is left as it is."""
    fenced = [block for block in reply.split("```")[1::2] if "<think>" in block]
    text = fenced[-1] if fenced else reply
    try:
        return parse(text, profile).render(decimals)
    except TraceError:
        return text


def log_folder(output: str) -> Path:
    """Where the calls of models are logged: in a dataset folder on disk; for one in an object store, which takes no
    appends, in a folder for temporary files on the node of the calls."""
    if "://" not in output:
        return Path(output)
    return Path(tempfile.gettempdir()) / f"sif_ray-{hashlib.sha256(output.encode()).hexdigest()[:16]}"
