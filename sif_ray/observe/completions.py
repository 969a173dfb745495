"""The best and the worst completion of every step, with what the policy looked at drawn on its two pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sif_ray.method.boxes import Box, is_box
from sif_ray.method.trace import find_areas
from sif_ray.observe import jsonl
from sif_ray.observe.background import Background
from sif_ray.observe.focus_picture import draw_pair, jpeg
from sif_ray.records import Sample, ScoredGroup

FILE = "completions.jsonl"
MAX_PICTURES = 400  # files of a run; about 20 MB at most
MAX_TEXT_CHARS = 8000  # of a completion in the file; a policy that rambles must not fill the disk
MAX_STEPS_BEHIND = 8  # that wait to be drawn


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
    """A JPEG of a sample with a focus and its evidence."""
    return jpeg(draw_pair(sample.image, sample.depth_image, focus, sample.boxes))
