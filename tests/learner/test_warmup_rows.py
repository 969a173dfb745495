"""The stream from dataset rows to supervised batches."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sif_ray.config import PromptConfig
from sif_ray.learner.rows import batches, scene_sequence, scenes, shuffled


def test_a_scene_is_the_neighbouring_rows_of_one_image(make_sample):
    first, second = make_sample(0, question=0), make_sample(0, question=1)
    other = make_sample(1)
    assert list(scenes([first, second, other, first])) == [[first, second], [other], [first]]
    repainted = replace(second, image=other.image)
    assert list(scenes([first, repainted])) == [[first], [repainted]]


@given(st.lists(st.integers(), max_size=50), st.integers(1, 60))
def test_shuffling_loses_nothing(items, buffer_size):
    assert sorted(shuffled(items, buffer_size, random.Random(0))) == sorted(items)


def test_shuffling_follows_its_seed_and_moves_things():
    def order(seed: int) -> list[int]:
        return list(shuffled(range(100), 40, random.Random(seed)))

    assert order(1) == order(1) != order(2)
    assert order(1) != list(range(100))


@given(st.lists(st.integers(1, 5), max_size=20), st.integers(1, 7))
def test_batches_have_their_size_and_keep_the_order(scene_sizes, num_rows):
    numbered = iter(range(100))
    made = [[next(numbered) for _ in range(size)] for size in scene_sizes]
    found = list(batches(made, num_rows))
    assert all(sum(map(len, batch)) == num_rows for batch in found)
    rows = [row for batch in found for scene in batch for row in scene]
    assert rows == list(range(sum(scene_sizes) // num_rows * num_rows))


def test_a_branch_continues_the_common_prompt_to_the_exact_tokens_of_its_row(processor, make_sample):
    rows = [make_sample(0, question=0), make_sample(0, question=1)]
    sequence = scene_sequence(rows, processor, PromptConfig())
    for row, branch, mask in zip(rows, sequence.branches, sequence.loss_masks, strict=True):
        prompt = processor.encode_prompt(row.question, (row.image, row.depth_image), PromptConfig())
        answer = processor.encode_completion(row.trace)
        assert [*sequence.prefix_ids, *branch] == prompt.token_ids_P + answer
        assert [token for token, predicted in zip(branch, mask, strict=True) if predicted] == answer
        assert tuple(sequence.image_grid_thw) == prompt.image_grid_thw
    assert len(sequence.prefix_ids) > 32  # both images of 16 tokens are shared
    assert sequence.num_tokens < sum(scene_sequence([row], processor, PromptConfig()).num_tokens for row in rows)


def test_a_row_without_a_trace_is_refused(processor, make_sample):
    with pytest.raises(ValueError, match=r"scene0-0: has no trace"):
        scene_sequence([replace(make_sample(0), trace="")], processor, PromptConfig())
