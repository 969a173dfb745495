"""A chat model as teacher: it is shown the forward frames of a photograph and writes the trace that leads through them.

The request is the released one (paper: "forward inference"), worded in `sif_ray.method.prompts`: a system message with
the question and the true answer; then, for every frame, its boxes and their depths as text and the photograph with
these boxes drawn on it in green.

What the endpoint does to a call is the business of `sif_ray.judge.caller`, with these outcomes:

- an outage, or a model that asks for patience: waited for; longer than `teacher.max_wait_s`, the run stops and can be
  started again (`TeacherUnavailable`);
- a wrong key or model: the run stops (`TeacherUnavailable`);
- a request that the model will not answer, or fails to answer while it answers others: a row refused with a reason
  (`RowRefused`).

Every attempt is a line of the audit log: sample, texts, hashes of the images, reply, error, seconds, tokens.

A restarted run repeats the rows of a shard only as far as the model repeats itself. It is sent a `seed` that follows
from the sample's id, which vLLM heeds and others may ignore.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from sif_ray.config import ConfigError, TeacherConfig
from sif_ray.datagen.checks import EXPLANATIONS
from sif_ray.judge.caller import Call, Caller, ask_before_a_run
from sif_ray.judge.client import CallError, CallRefused, Completion, EndpointDown, image_part
from sif_ray.judge.factory import read_api_key
from sif_ray.method.boxes import Box, norm_to_pixels
from sif_ray.method.prompts import teacher_content, teacher_repair, teacher_system
from sif_ray.method.trace import AreaBox
from sif_ray.records import Sample

GREEN = (0, 255, 0)
LINE_PX = 2
JPEG_QUALITY = 85
MAX_SIDE_PX = 2048  # larger photographs are reduced: models do so themselves, and a request holds up to five

Message = dict[str, Any]


class RowRefused(Exception):
    """A row gets no trace; `reason` is a stable word that is counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class TeacherUnavailable(RuntimeError):
    """No row gets a trace now. The run stops; what is committed stays, and the run can be started again."""


class ChatTeacher:
    """Replies of a chat model. For one event loop.

    Example: `await ChatTeacher(config, Path("runs/data/teacher/audit-0.jsonl")).reply(messages, "gqa-7", seed=1)`.
    """

    def __init__(self, config: TeacherConfig, audit: Path) -> None:
        """Of the limits of `config` this teacher takes its share, one in `actors_max`. Raises `ConfigError` when the
        environment lacks the key's variable."""
        self._config = config
        key = read_api_key(config, "teacher")
        self._caller = Caller("teacher", config, key, audit, config.actors_max, ping=easy_call(config))
        self.meter = self._caller.meter

    async def reply(self, messages: Sequence[Message], sample_id: str, seed: int) -> Completion:
        """What the model writes after `messages`. Raises `RowRefused` and `TeacherUnavailable`."""
        try:
            return await self._caller.call(_call(self._config, messages, sample_id, seed))
        except CallRefused as error:
            raise RowRefused("teacher_refusal") from error
        except CallError as error:
            where = f"teacher: {self._config.model!r} at {self._config.base_url}"
            if isinstance(error, EndpointDown):
                raise TeacherUnavailable(
                    f"{where} answered nothing for teacher.max_wait_s = {self._config.max_wait_s:g} s ({error}); start "
                    "the run again once it does, nothing is lost"
                ) from error
            if not error.retry:
                raise TeacherUnavailable(
                    f"{where} answers no call ({error}); correct teacher.api_key_env or teacher.model, and start the "
                    "run again, nothing is lost"
                ) from error
            raise RowRefused("teacher_timeout" if error.reason == "timeout" else "teacher_failed") from error

    def metrics(self) -> dict[str, float]:
        """Totals of this worker, see `Caller.metrics`."""
        return self._caller.metrics()

    async def close(self) -> None:
        """Close connections and log."""
        await self._caller.close()


def check_teacher(config: TeacherConfig) -> None:
    """Raise `ConfigError` when the teacher's endpoint cannot work: it is asked something easy about a picture."""
    try:
        asyncio.run(ask_before_a_run(config, read_api_key(config, "teacher"), easy_call(config)))
    except CallError as error:
        raise ConfigError(
            f"teacher: {config.model!r} at {config.base_url} did not answer a test question ({error}); start the "
            "teacher, or correct teacher.base_url, teacher.model, teacher.api_key_env or teacher.max_tokens"
        ) from error


def easy_call(config: TeacherConfig) -> Call[Completion]:
    """A call like those of rows, but small; what is replied does not matter."""
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), GREEN).save(picture, "JPEG")
    content = [{"type": "text", "text": "Which colour is this? One word."}, image_part(picture.getvalue())]
    return _call(config, [{"role": "user", "content": content}], sample_id="", seed=0)


def lesson(sample: Sample, areas: Sequence[Sequence[AreaBox]], decimals: int) -> list[Message]:
    """The messages that put a sample to the teacher; `areas` are its frames with depth."""
    photos = iter(framed_photos(sample.image, sample.frames))
    content = [
        image_part(next(photos)) if part["type"] == "image" else part for part in teacher_content(areas, decimals)
    ]
    return [
        {"role": "system", "content": teacher_system(sample.question, sample.answer, decimals)},
        {"role": "user", "content": content},
    ]


def repair(messages: list[Message], reply: str, reasons: Sequence[str]) -> list[Message]:
    """The messages that ask for another reply and say what is wrong with this one."""
    explained = teacher_repair([EXPLANATIONS[reason] for reason in reasons])
    return [*messages, {"role": "assistant", "content": reply}, {"role": "user", "content": explained}]


def framed_photos(image: bytes, frames: Sequence[Sequence[Box]]) -> list[bytes]:
    """For every frame a JPEG of the photograph with the frame's boxes in green; the lines lie inside the boxes."""
    with Image.open(io.BytesIO(image)) as opened:
        opened.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX))
        photo = opened.convert("RGB")
    encoded = []
    for frame in frames:
        framed = photo.copy()
        draw = ImageDraw.Draw(framed)
        for box in frame:
            x1, y1, x2, y2 = (round(value) for value in norm_to_pixels(box, *framed.size))
            draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=GREEN, width=LINE_PX)
        buffer = io.BytesIO()
        framed.save(buffer, "JPEG", quality=JPEG_QUALITY)
        encoded.append(buffer.getvalue())
    return encoded


def _call(config: TeacherConfig, messages: list[Message], sample_id: str, seed: int) -> Call[Completion]:
    request = {
        "model": config.model,
        "messages": messages,
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
        "seed": seed,
    }
    texts, images = [], []
    for part in itertools.chain.from_iterable(map(_parts, messages)):
        if part["type"] == "text":
            texts.append(part["text"])
        else:
            images.append(hashlib.sha256(part["image_url"]["url"].encode()).hexdigest())
    return Call(
        lambda: request,
        lambda completion: completion,
        {"sample_id": sample_id, "seed": seed, "prompt": texts, "images_sha256": images},
    )


def _parts(message: Message) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
