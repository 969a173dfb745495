"""One request from image and question to a checked trace: depth, generation, reading of the output.

No Ray and no HTTP here: depth and policy are two functions.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from sif_ray.config import ServeConfig
from sif_ray.depth.encoding import depth_png
from sif_ray.method.boxes import is_box
from sif_ray.method.trace import AreaBox, TraceError, find_answer, find_areas, parse
from sif_ray.serve.images import RequestRefused, read_photo
from sif_ray.serve.protocol import FocusBox, FocusStep, Seconds, SifResponse


@dataclass(frozen=True)
class Generation:
    """What the policy wrote. Example: `Generation(text="<think>...", policy_version=12)`."""

    text: str
    policy_version: int


@dataclass(frozen=True)
class Refused:
    """A request that the policy cannot take, say for its length."""

    message: str


EstimateDepth = Callable[[Image.Image], Awaitable[npt.NDArray[np.float32]]]
"""RGB photograph to depth_rel, (height, width), 0 = near."""

Generate = Callable[[str, tuple[bytes, ...]], Awaitable[Generation | Refused]]
"""Question and encoded images, (rgb, depth) or (rgb,), to the policy's output. A refusal is a value, because an error
would come back wrapped in a remote one."""


class SifService:
    """Answers questions about images within the limits of its configuration.

    Example: `await SifService(config, estimate_depth, generate).answer(png, "Which is closer, ...?")`.
    """

    def __init__(self, config: ServeConfig, estimate_depth: EstimateDepth, generate: Generate) -> None:
        self.config = config
        self._estimate_depth = estimate_depth
        self._generate = generate

    async def answer(self, encoded: bytes, question: str) -> SifResponse:
        """The policy's answer with its trace. Raises `RequestRefused` for an image or a question it cannot take."""
        question = question.strip()
        if not question:
            raise RequestRefused(422, "question is blank")
        if len(question) > self.config.max_question_chars:
            limit = self.config.max_question_chars
            raise RequestRefused(413, f"question has {len(question)} characters; at most {limit} are accepted")
        photo = await asyncio.to_thread(read_photo, encoded, self.config.max_image_bytes, self.config.max_image_pixels)
        started_s = time.monotonic()
        depth_rel = await self._estimate_depth(photo.rgb)
        encoded_depth = await asyncio.to_thread(depth_png, depth_rel)
        depth_done_s = time.monotonic()
        images = (photo.encoded, encoded_depth) if self.config.prompt.depth_image else (photo.encoded,)
        generation = await self._generate(question, images)
        if isinstance(generation, Refused):
            raise RequestRefused(422, generation.message)
        seconds = Seconds(depth=depth_done_s - started_s, generate=time.monotonic() - depth_done_s)
        return read_output(generation, encoded_depth, seconds, self.config.profile)


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
        depth_image=base64.b64encode(encoded_depth).decode("ascii"),
        text=text,
        policy_version=generation.policy_version,
        seconds=seconds,
    )


def _shown(boxes: Iterable[AreaBox]) -> list[FocusBox]:
    return [FocusBox(bbox_xyxy_norm=box.bbox_2d, depth=box.depth) for box in boxes if is_box(box.bbox_2d)]
