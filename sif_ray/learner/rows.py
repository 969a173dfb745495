"""Dataset rows to supervised sequences: which rows there are, and what a rank trains on."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sif_ray.config import ConfigError, PromptConfig
from sif_ray.datagen.dataset import ACCEPTED, SUBSETS, as_folder
from sif_ray.datagen.scan import scan
from sif_ray.learner.order import Shard, is_held_back
from sif_ray.policy.branches import BranchedSequence
from sif_ray.policy.processor import PolicyProcessor
from sif_ray.records import Sample
from sif_ray.storage import Folder

INDEX_COLUMNS = ["sample_id", "scene_id", "split", "trace"]

Scene = list[Sample]
"""Rows of one image, in order."""


@dataclass(frozen=True)
class Share:
    """What one rank trains on in a step, or a part of it."""

    step: int
    sequences: list[BranchedSequence] = field(default_factory=list)
    sample_ids: list[str] = field(default_factory=list)  # of the rows in them
    skipped_ids: list[str] = field(default_factory=list)  # of rows that are too long

    def __add__(self, other: Share) -> Share:
        return Share(
            self.step,
            self.sequences + other.sequences,
            self.sample_ids + other.sample_ids,
            self.skipped_ids + other.skipped_ids,
        )


def index_rows(data: str, split: str, eval_share: float) -> tuple[list[Shard], list[Shard]]:
    """The rows of a split to train on, and those of the photographs held back for the evaluation. Reads no image.

    Raises `ConfigError` for a row without a trace.
    """
    folder = as_folder(data)
    subsets = folder.read_json(SUBSETS) if folder.exists(SUBSETS) else {}
    subset = set(subsets[split]["sample_ids"]) if split in subsets else None
    trained: dict[str, list[tuple[int, ...]]] = {}
    held_back: dict[str, list[tuple[int, ...]]] = {}
    wanted = []
    for file, number, row in _numbered(folder):
        if row["split"] == split if subset is None else row["sample_id"] in subset:
            if not row["trace"]:
                raise ConfigError(
                    f"data = {data!r}: {row['sample_id']} has no trace to learn from; generate it with a teacher"
                )
            wanted.append((file, row["scene_id"], number))
    for (file, scene_id), rows in itertools.groupby(wanted, key=lambda found: found[:2]):
        part = held_back if is_held_back(scene_id, eval_share) else trained
        part.setdefault(file, []).append(tuple(number for _, _, number in rows))
    return _shards(trained), _shards(held_back)


def scenes(samples: Iterable[Sample]) -> Iterator[Scene]:
    """Neighbouring rows with the same scene and the same images."""
    for _, rows in itertools.groupby(samples, key=lambda sample: (sample.scene_id, sample.image, sample.depth_image)):
        yield list(rows)


def encode_share(
    step: int, samples: Iterable[Sample], processor: PolicyProcessor, prompt: PromptConfig, max_length: int
) -> Share:
    """Rows as sequences, one for each of their scenes. A row of more than `max_length` tokens is skipped (0 = none)."""
    share = Share(step)
    for scene in scenes(samples):
        sequence = scene_sequence(scene, processor, prompt)
        fits = [max_length == 0 or len(sequence.prefix_ids) + len(branch) <= max_length for branch in sequence.branches]
        for sample, kept in zip(scene, fits, strict=True):
            (share.sample_ids if kept else share.skipped_ids).append(sample.sample_id)
        if any(fits):
            share.sequences.append(sequence.choose([number for number, kept in enumerate(fits) if kept]))
    return share


def scene_sequence(scene: Scene, processor: PolicyProcessor, prompt: PromptConfig) -> BranchedSequence:
    """A scene as one sequence: what its prompts have in common, images included, is the prefix; each row is a branch.

    Only the assistant's tokens are predicted.
    """
    images = scene[0].prompt_images(prompt.depth_image)
    encoded = processor.encode_prompts([sample.question for sample in scene], images, prompt)
    answers = [processor.encode_completion(sample.trace) for sample in scene]
    prompts = [prompt.token_ids_P for prompt in encoded]
    shared = common_prefix_length(prompts)
    if processor.image_token_id in prompts[0][shared:]:
        raise ValueError(f"{scene[0].scene_id}: the chat template puts the question before an image; train single rows")
    questions = [ids[shared:] for ids in prompts]
    return BranchedSequence(
        prefix_ids=prompts[0][:shared],
        branches=[question + answer for question, answer in zip(questions, answers, strict=True)],
        pixel_values=encoded[0].pixel_values,
        image_grid_thw=encoded[0].image_grid_thw,
        loss_masks=[
            [False] * len(question) + [True] * len(answer) for question, answer in zip(questions, answers, strict=True)
        ],
    )


def common_prefix_length(sequences: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens that all sequences share."""
    shortest = min(len(sequence) for sequence in sequences)
    for position in range(shortest):
        if len({sequence[position] for sequence in sequences}) > 1:
            return position
    return shortest


def _numbered(folder: Folder) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(file, number in it, columns of the index) of every accepted row."""
    num_read: Counter[str] = Counter()
    for file, batch in scan(folder.child(ACCEPTED), INDEX_COLUMNS):
        for row in batch.to_pylist():
            yield file, num_read[file], row
            num_read[file] += 1


def _shards(scenes_by_file: dict[str, list[tuple[int, ...]]]) -> list[Shard]:
    return [Shard(file, tuple(scenes)) for file, scenes in scenes_by_file.items()]
