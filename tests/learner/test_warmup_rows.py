"""From dataset rows to supervised sequences: which rows, in which tokens, in which step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
from sif_dataset import write_dataset

from sif_ray.config import ConfigError, PromptConfig
from sif_ray.datagen.dataset import ACCEPTED, as_folder
from sif_ray.learner.order import is_held_back, rows_of, training_windows
from sif_ray.learner.rows import encode_share, index_rows, scene_sequence, scenes
from sif_ray.learner.stream import Feed, RowStream

BATCH = 5


@pytest.fixture(scope="module")
def samples(make_sample):
    """12 scenes with 2 rows each, and between them rows of another split that have no trace."""
    rows = [make_sample(scene, question=number) for scene in range(12) for number in range(2)]
    others = [replace(make_sample(scene), split="heldout", trace="") for scene in range(20, 24)]
    return rows[:10] + others + rows[10:]


@pytest.fixture(scope="module")
def dataset(samples, tmp_path_factory) -> str:
    return write_dataset(tmp_path_factory.mktemp("rows") / "data", samples, rows_per_shard=7)


# --- which rows ------------------------------------------------------------------------------------------------------


def ids_of(samples, shards) -> list[str]:
    return [samples[7 * int(s.file[:5]) + row].sample_id for s in shards for scene in s.scenes for row in scene]


def test_the_rows_of_a_split_are_divided_by_photograph(dataset, samples):
    trained, held_back = index_rows(dataset, "warmup", eval_share=0.3)
    wanted = [sample for sample in samples if sample.split == "warmup"]
    away = [sample.sample_id for sample in wanted if is_held_back(sample.scene_id, 0.3)]
    assert 0 < len(away) < len(wanted)
    assert ids_of(samples, held_back) == away
    assert ids_of(samples, trained) == [sample.sample_id for sample in wanted if sample.sample_id not in away]
    everything, nothing = index_rows(dataset, "warmup", eval_share=0.0)
    assert len(ids_of(samples, everything)) == 24 and not nothing


def test_a_split_may_be_the_name_of_a_subset(dataset, samples):
    chosen = [samples[number].sample_id for number in (0, 3, 20)]
    path = Path(dataset) / "subsets.json"
    path.write_text(json.dumps({"few": {"seed": 0, "sample_ids": chosen}}))
    try:
        assert ids_of(samples, index_rows(dataset, "few", 0.0)[0]) == chosen
    finally:
        path.unlink()


def test_rows_without_a_trace_are_refused(dataset):
    with pytest.raises(ConfigError, match=r"scene20-0 has no trace to learn from"):
        index_rows(dataset, "heldout", 0.0)


# --- their tokens ----------------------------------------------------------------------------------------------------


def test_a_scene_is_the_neighbouring_rows_of_one_image(make_sample):
    first, second = make_sample(0, question=0), make_sample(0, question=1)
    other = make_sample(1)
    assert list(scenes([first, second, other, first])) == [[first, second], [other], [first]]
    repainted = replace(second, image=other.image)
    assert list(scenes([first, repainted])) == [[first], [repainted]]


def test_a_branch_continues_the_common_prompt_to_the_exact_tokens_of_its_row(processor, make_sample):
    rows = [make_sample(0, question=0), make_sample(0, question=1)]
    sequence = scene_sequence(rows, processor, PromptConfig())
    for row, branch, mask in zip(rows, sequence.branches, sequence.loss_masks, strict=True):
        prompt = processor.encode_prompt(row.question, (row.image, row.depth_image), PromptConfig())
        answer = processor.encode_completion(row.trace)
        assert [*sequence.prefix_ids, *branch] == prompt.token_ids_P + answer
        assert [token for token, predicted in zip(branch, mask, strict=True) if predicted] == answer
        np.testing.assert_array_equal(sequence.pixel_values, prompt.pixel_values)
    assert processor.image_token_id in sequence.prefix_ids
    assert len(sequence.image_grid_thw) == 2


def test_rows_that_are_too_long_are_skipped_and_named(processor, make_sample):
    short, other = make_sample(0), make_sample(1)
    long = replace(make_sample(0, question=1), trace=short.trace * 3)
    length = scene_sequence([short], processor, PromptConfig()).num_tokens
    share = encode_share(3, [short, long, other], processor, PromptConfig(), max_length=length)
    assert (share.step, share.sample_ids, share.skipped_ids) == (3, ["scene0-0", "scene1-0"], ["scene0-1"])
    assert [len(sequence.branches) for sequence in share.sequences] == [1, 1]
    nothing = encode_share(0, [long], processor, PromptConfig(), max_length=length)
    assert (nothing.sequences, nothing.skipped_ids) == ([], ["scene0-1"])
    assert encode_share(0, [long], processor, PromptConfig(), max_length=0).sample_ids == ["scene0-1"]


# --- their steps -----------------------------------------------------------------------------------------------------


@ray.remote(num_cpus=0)
def taken(iterator, steps: range) -> list[list[tuple[str, int]]]:
    """The samples that one rank is given in each step, with the tokens of their share."""
    feed = Feed(iterator)
    shares = [feed.take(step) for step in steps]
    return [[(name, sum(s.num_tokens for s in share.sequences)) for name in share.sample_ids] for share in shares]


@pytest.mark.parametrize(("num_ranks", "first_step"), [(2, 3), pytest.param(3, 0, marks=pytest.mark.slow)])
def test_every_step_has_its_rows_on_any_number_of_ranks_and_from_any_step_on(
    ray_local, dataset, samples, tiny_policy, num_ranks, first_step
):
    shards, _ = index_rows(dataset, "warmup", 0.0)
    num_steps = 8  # an epoch of 24 rows and a half
    windows = training_windows(shards, num_steps * BATCH, seed=7)
    stream = RowStream(
        as_folder(dataset).child(ACCEPTED), tuple(shards), tuple(windows), BATCH, tiny_policy, PromptConfig(), 0, 0
    )
    order = [row for window in windows for row in rows_of(window, shards)]
    wanted = [samples[7 * int(shards[number].file[:5]) + row].sample_id for number, row in order]
    steps = range(first_step, num_steps)
    parts = stream.dataset(first_step, num_steps, num_ranks).streaming_split(num_ranks, equal=False)
    by_rank = ray.get([taken.remote(part, steps) for part in parts], timeout=120)
    for step in steps:
        found = [name for shares in by_rank for name, _ in shares[step - first_step]]
        assert sorted(found) == sorted(wanted[step * BATCH : (step + 1) * BATCH])
        assert max(len(shares[step - first_step]) for shares in by_rank) <= -(-BATCH // num_ranks) + 2
