"""One request from image and question to a checked trace: depth, generation, reading of the output.

No Ray and no HTTP here: depth and policy are functions.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import replace

from sif_ray.config import SamplingConfig, ServeConfig
from sif_ray.datagen.pictures import Photo
from sif_ray.method.boxes import is_box
from sif_ray.method.trace import AreaBox, TraceError, find_answer, find_areas, parse
from sif_ray.observe.focus_picture import draw_steps, jpeg
from sif_ray.serve.addresses import ADDRESS, Addresses
from sif_ray.serve.backends import Ask, EstimateDepth, Generation, Policy, Refused
from sif_ray.serve.growing_trace import GrowingTrace
from sif_ray.serve.images import decode_base64, read_photo
from sif_ray.serve.protocol import (
    AnswerEvent,
    DepthEvent,
    FocusBox,
    FocusStep,
    Seconds,
    SifEvent,
    SifResponse,
    StepEvent,
)
from sif_ray.serve.record import RecordedPolicy, current, recorded_depth
from sif_ray.serve.refusal import RequestRefused

MAX_DRAWN = 100  # steps of an overlay; a JPEG has room for 65,535 lines


class SifService:
    """Answers questions about images within the limits of its configuration.

    Example: `await SifService(config, estimate_depth, policy).answer(png, "Which is closer, ...?")`.
    """

    def __init__(self, config: ServeConfig, estimate_depth: EstimateDepth, policy: Policy) -> None:
        self.config = config
        self.models = {config.model_name: "", **{name: name for name in config.adapters}}
        """Adapter by the name of the model, "" for the policy itself."""
        self.policy = RecordedPolicy(policy)
        self._estimate_depth = recorded_depth(estimate_depth)
        self._addresses = Addresses(config.image_origins, config.max_image_bytes)

    @property
    def sampling(self) -> SamplingConfig:
        """What the server's owner has set."""
        return SamplingConfig(temperature=self.config.temperature, max_tokens=self.config.max_tokens)

    def adapter_of(self, model: str) -> str:
        """The adapter of a model's name, "" for the policy itself. Raises `RequestRefused` (404)."""
        if model not in self.models:
            raise RequestRefused(404, f"model {model!r} is not served; there are {', '.join(self.models)}")
        current().model = model
        return self.models[model]

    async def answer(self, encoded: bytes, question: str, model: str = "", *, overlay: bool = False) -> SifResponse:
        """The answer of a model (default: the policy itself) with its trace, and if wanted the drawn `overlay`.

        Raises `RequestRefused` for an image, a question or a model it cannot take.
        """
        started_s = time.monotonic()
        ask, encoded_depth = await self.prepare(encoded, question, self.sampling, model)
        depth_done_s = time.monotonic()
        generation = accepted(await self.policy.generate(ask))
        seconds = Seconds(depth=depth_done_s - started_s, generate=time.monotonic() - depth_done_s)
        return await self._reply(ask, generation, encoded_depth, seconds, overlay)

    async def stream(
        self, encoded: bytes, question: str, model: str = "", *, overlay: bool = False
    ) -> AsyncGenerator[SifEvent]:
        """The same answer while it is written: the depth image, steps and answer as they grow, the whole reply.

        Raises `RequestRefused` here, before there is any event, for what `prepare` refuses; what the policy refuses is
        raised in place of the next event.
        """
        started_s = time.monotonic()
        ask, encoded_depth = await self.prepare(encoded, question, self.sampling, model)
        return self._events(ask, encoded_depth, time.monotonic() - started_s, overlay)

    async def _events(self, ask: Ask, encoded_depth: bytes, depth_s: float, overlay: bool) -> AsyncGenerator[SifEvent]:
        yield DepthEvent(depth_image=_base64(encoded_depth))
        asked_s = time.monotonic()
        text, trace = "", GrowingTrace()
        async with aclosing(self.policy.stream(ask)) as parts:
            async for part in parts:
                generation = accepted(part)
                text += generation.text
                steps, answer = list(trace.steps), trace.answer
                trace.feed(generation.text)
                for index, step in enumerate(trace.steps):
                    if step not in steps[index : index + 1]:
                        yield StepEvent(index=index, boxes=_shown(step.boxes), text=step.text)
                if trace.answer != answer:
                    yield AnswerEvent(text=trace.answer)
        seconds = Seconds(depth=depth_s, generate=time.monotonic() - asked_s)
        yield await self._reply(ask, replace(generation, text=text), encoded_depth, seconds, overlay)

    async def _reply(
        self, ask: Ask, generation: Generation, encoded_depth: bytes, seconds: Seconds, overlay: bool
    ) -> SifResponse:
        reply = read_output(generation, encoded_depth, seconds, self.config.profile)
        current().valid = reply.valid
        if overlay:
            reply.overlay_image = _base64(await asyncio.to_thread(_overlay, ask.images[0], encoded_depth, reply))
        return reply

    async def prepare(
        self, encoded: bytes, question: str, sampling: SamplingConfig, model: str = "", seed: int | None = None
    ) -> tuple[Ask, bytes]:
        """A question about a photograph as the policy was trained to see it, and the depth image it is shown.

        Raises `RequestRefused`.
        """
        adapter = self.adapter_of(model or self.config.model_name)
        question = question.strip()
        if not question:
            raise RequestRefused(422, "question is blank")
        self.check_text("question", question)
        photo = await self.read_photo(encoded)
        encoded_depth = await self._estimate_depth(photo.encoded)
        images = (photo.encoded, encoded_depth) if self.config.prompt.depth_image else (photo.encoded,)
        return Ask(images, sampling, question=question, seed=seed, adapter=adapter), encoded_depth

    def check_text(self, name: str, text: str) -> None:
        """Raise `RequestRefused` for a text that is longer than the server accepts, or that was not sent as UTF-8."""
        if "\0" in text:
            raise RequestRefused(422, f"{name} holds a NUL character; send text as UTF-8")
        if len(text) > self.config.max_question_chars:
            limit = self.config.max_question_chars
            raise RequestRefused(413, f"{name} has {len(text)} characters; at most {limit} are accepted")

    async def load_image(self, image: str) -> bytes:
        """The encoded image of base64 text, of a data URL, or behind an address that is allowed. Raises
        `RequestRefused`."""
        return await self._addresses.fetch(image) if ADDRESS.match(image) else decode_base64(image)

    async def read_photo(self, encoded: bytes) -> Photo:
        """An image as it was sent, upright. Raises `RequestRefused`."""
        return await asyncio.to_thread(read_photo, encoded, self.config.max_image_bytes, self.config.max_image_pixels)


def accepted(generation: Generation | Refused) -> Generation:
    """The generation, or `RequestRefused` where the policy refused."""
    if isinstance(generation, Refused):
        raise RequestRefused(422, generation.message)
    return generation


def read_output(generation: Generation, encoded_depth: bytes, seconds: Seconds, profile: str) -> SifResponse:
    """The reply that describes an output, well formed or not."""
    text = generation.text
    try:
        trace = parse(text, profile)
    except TraceError as error:
        reasons = [str(reason) for reason in error.reasons]
        steps = [FocusStep(boxes=_shown(area), text="") for area in find_areas(text)]
    else:
        reasons = []
        steps = [FocusStep(boxes=_shown(step.boxes), text=step.text) for step in trace.steps]
    return SifResponse(
        answer=find_answer(text),
        valid=not reasons,
        reasons=reasons,
        steps=steps,
        depth_image=_base64(encoded_depth),
        text=text,
        policy_version=generation.policy_version,
        seconds=seconds,
    )


def _overlay(photo: bytes, encoded_depth: bytes, reply: SifResponse) -> bytes:
    steps = [([box.bbox_xyxy_norm for box in step.boxes], step.text) for step in reply.steps[:MAX_DRAWN]]
    last = "No answer block was written." if reply.answer is None else f"Answer: {reply.answer}"
    return jpeg(draw_steps(photo, encoded_depth, steps, last))


def _shown(boxes: Iterable[AreaBox]) -> list[FocusBox]:
    return [FocusBox(bbox_xyxy_norm=box.bbox_2d, depth=box.depth) for box in boxes if is_box(box.bbox_2d)]


def _base64(encoded: bytes) -> str:
    return base64.b64encode(encoded).decode("ascii")
