"""The best and the worst completion of every step, with what the policy looked at drawn on its two pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from sif_ray.method.boxes import Box, is_box
from sif_ray.method.trace import find_areas
from sif_ray.observe import jsonl
from sif_ray.observe.background import Background
from sif_ray.records import Sample, ScoredGroup

FILE = "completions.jsonl"
MAX_PICTURES = 400  # files of a run; about 20 MB at most
SIDE_PX = 384  # longer side of each of the two pictures in a file
GAP_PX = 6
MAX_TEXT_CHARS = 8000  # of a completion in the file; a policy that rambles must not fill the disk
MAX_STEPS_BEHIND = 8  # that wait to be drawn

FOCUS, CASE, TRUTH, GREY = (255, 216, 61), (0, 0, 0), (255, 255, 255), (128, 128, 128)
SHADE = 0.58  # brightness outside the focus


@dataclass(frozen=True)
class Completion:
    """One rollout of a batch with its rewards."""

    ticket_id: str
    sample_id: str
    text: str
    finish_reason: str
    versions: tuple[int, int]  # oldest and newest policy version of its tokens
    total: float
    terms: dict[str, float]


def best_and_worst(groups: Sequence[ScoredGroup]) -> tuple[Completion, Completion]:
    """The rollouts with the highest and the lowest total reward; of equal ones the first."""
    places = [(group, index) for group in groups for index in range(len(group.group.rollouts))]
    return (
        _completion(*max(places, key=lambda place: place[0].rewards_G[place[1]])),
        _completion(*min(places, key=lambda place: place[0].rewards_G[place[1]])),
    )


def _completion(scored: ScoredGroup, index: int) -> Completion:
    rollout = scored.group.rollouts[index]
    versions = [version for version, _ in rollout.version_spans]
    return Completion(
        ticket_id=scored.group.ticket_id,
        sample_id=scored.group.sample_id,
        text=rollout.text,
        finish_reason=rollout.finish_reason,
        versions=(min(versions), max(versions)),
        total=float(scored.rewards_G[index]),
        terms={name: float(values_G[index]) for name, values_G in scored.terms_G.items()},
    )


class CompletionLog:
    """Appends two lines per step to `completions.jsonl` (sample id, question, reference, text, reward terms) and draws
    their pictures into `completions/`, in a thread of its own.

    Of a run longer than `MAX_PICTURES` / 2 steps, evenly spread steps get pictures. "picture" is null in other lines.

    Example: `CompletionLog(folder, samples, num_steps=150).keep(3, groups)`.
    """

    def __init__(self, folder: Path, samples: Mapping[str, Sample], num_steps: int) -> None:
        self._folder = folder
        self._samples = samples
        self._every = max(1, -(-2 * num_steps // MAX_PICTURES))
        self._file = jsonl.open_for_append(folder / FILE)
        (folder / "completions").mkdir(exist_ok=True)
        self._background = Background("drawing of completions", MAX_STEPS_BEHIND)

    def keep(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        """Keep the best and the worst completion of `groups`, the batch of `step`. Returns at once."""
        for role, completion in zip(("best", "worst"), best_and_worst(groups), strict=True):
            self._background.submit(self._write, step, role, completion)

    def close(self) -> None:
        """Wait for what is not drawn yet."""
        self._background.close()
        self._file.close()

    def _write(self, step: int, role: str, completion: Completion) -> None:
        sample = self._samples[completion.sample_id]
        picture = None
        if step % self._every == 0 or step == 1:
            picture = f"completions/step-{step:06d}-{role}.jpg"
            (self._folder / picture).write_bytes(draw(sample, last_focus(completion.text)))
        self._file.write(
            jsonl.to_line(
                {
                    "step": step,
                    "role": role,
                    "ticket_id": completion.ticket_id,
                    "sample_id": completion.sample_id,
                    "question": sample.question,
                    "reference": sample.answer,
                    "text": completion.text[:MAX_TEXT_CHARS],
                    "finish_reason": completion.finish_reason,
                    "versions": list(completion.versions),
                    "total": completion.total,
                    "terms": completion.terms,
                    "picture": picture,
                }
            )
        )


def read_completions(folder: Path) -> list[dict[str, Any]]:
    """The lines of `CompletionLog` by step, best before worst; of a step logged twice the later lines count."""
    path = folder / FILE
    lines = {(line["step"], line["role"]): line for line in jsonl.read(path)} if path.exists() else {}
    return [lines[key] for key in sorted(lines)]


# --- pictures --------------------------------------------------------------------------------------------------------


def last_focus(text: str) -> list[Box]:
    """The boxes of the last look, as far as they are boxes: what the box reward compares with the evidence."""
    areas = find_areas(text)
    return [box.bbox_2d for box in areas[-1] if is_box(box.bbox_2d)] if areas else []


def draw(sample: Sample, focus: Sequence[Box]) -> bytes:
    """A JPEG of photograph and depth map side by side: focus yellow on dimmed surroundings, evidence white."""
    pictures = [_draw(encoded, sample.boxes, focus) for encoded in (sample.image, sample.depth_image)]
    height = max(picture.height for picture in pictures)
    joined = Image.new("RGB", (sum(picture.width for picture in pictures) + GAP_PX, height), GREY)
    joined.paste(pictures[0], (0, 0))
    joined.paste(pictures[1], (pictures[0].width + GAP_PX, 0))
    buffer = io.BytesIO()
    joined.save(buffer, "JPEG", quality=88, subsampling=0)  # thin coloured lines blur with subsampled colour
    return buffer.getvalue()


def _draw(encoded: bytes, truth: Sequence[Box], focus: Sequence[Box]) -> Image.Image:
    picture = Image.open(io.BytesIO(encoded))
    picture.thumbnail((SIDE_PX, SIDE_PX))  # a large JPEG is decoded at a smaller scale
    scale = SIDE_PX / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.convert("RGB").resize(size, Image.Resampling.NEAREST)
    if focus:
        inside = Image.new("1", size)
        for box in focus:
            ImageDraw.Draw(inside).rectangle(_pixels(box, size), fill=1)
        picture = Image.composite(picture, picture.point(lambda value: value * SHADE), inside)
    pen = ImageDraw.Draw(picture)
    for box in truth:
        _outline(pen, _pixels(box, size), TRUTH, 2)
    for box in focus:
        _outline(pen, _pixels(box, size), FOCUS, 3)
    return picture


def _outline(pen: ImageDraw.ImageDraw, corners: Sequence[int], colour: tuple[int, int, int], width: int) -> None:
    """A frame with a dark edge, so that it is seen on any ground."""
    x1, y1, x2, y2 = corners
    pen.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=CASE, width=width + 2)
    pen.rectangle((x1, y1, x2, y2), outline=colour, width=width)


def _pixels(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    width, height = size
    x1, y1, x2, y2 = box
    return round(x1 * (width - 1)), round(y1 * (height - 1)), round(x2 * (width - 1)), round(y2 * (height - 1))
