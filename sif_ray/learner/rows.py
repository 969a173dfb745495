"""Dataset rows to supervised batches, as a stream.

rows ─► scenes (neighbouring rows of one image) ─► shuffle buffer ─► batches of rows ─► branched sequences
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from sif_ray.config import PromptConfig
from sif_ray.policy.branches import BranchedSequence
from sif_ray.policy.processor import PolicyProcessor
from sif_ray.records import Sample

Item = TypeVar("Item")
Scene = list[Sample]
"""Rows of one image, in order."""


def scenes(samples: Iterable[Sample]) -> Iterator[Scene]:
    """Neighbouring rows with the same scene and the same images."""
    for _, rows in itertools.groupby(samples, key=lambda sample: (sample.scene_id, sample.image, sample.depth_image)):
        yield list(rows)


def shuffled(items: Iterable[Item], buffer_size: int, generator: random.Random) -> Iterator[Item]:
    """Every item once, in an order that is random within a buffer: a full shuffle of what fits into it."""
    buffer: list[Item] = []
    for item in items:
        if len(buffer) < buffer_size:
            buffer.append(item)
            continue
        place = generator.randrange(buffer_size)
        yield buffer[place]
        buffer[place] = item
    generator.shuffle(buffer)
    yield from buffer


def batches(scenes: Iterable[Scene], num_rows: int) -> Iterator[list[Scene]]:
    """Batches of exactly `num_rows` rows; a scene may be cut in two, rows after the last full batch are left out."""
    batch: list[Scene] = []
    room = num_rows
    for scene in scenes:
        while scene:
            batch.append(scene[:room])
            room -= len(batch[-1])
            scene = scene[len(batch[-1]) :]
            if room == 0:
                yield batch
                batch, room = [], num_rows


def scene_sequence(scene: Scene, processor: PolicyProcessor, prompt: PromptConfig) -> BranchedSequence:
    """A scene as one sequence: what its prompts have in common, images included, is the prefix; each row is a branch.

    Only the assistant's tokens are predicted. Raises ValueError for a row without a trace.
    """
    encoded, answers = [], []
    for sample in scene:
        if not sample.trace:
            raise ValueError(f"{sample.sample_id}: has no trace to learn from; generate the dataset with a teacher")
        images = sample.prompt_images(prompt.depth_image)
        encoded.append(processor.encode_prompt(sample.question, images, prompt))
        answers.append(processor.encode_completion(sample.trace))
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
