"""The order of a warm-up: each row once an epoch, whatever reads it and from wherever it goes on."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from sif_ray.learner import order
from sif_ray.learner.order import Shard, evaluation_windows, is_held_back, rows_of, training_windows

SIZES = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=6), min_size=1, max_size=12)


def shards_of(sizes: list[list[int]]) -> list[Shard]:
    """Shards with scenes of these sizes; a row of another split lies between any two scenes."""
    found = []
    for number, scene_sizes in enumerate(sizes):
        counter = itertools.count()
        scenes = []
        for size in scene_sizes:
            scenes.append(tuple(itertools.islice(counter, size)))
            next(counter)
        found.append(Shard(f"{number:05d}.parquet", tuple(scenes)))
    return found


def order_of(shards: list[Shard], num_rows: int, seed: int) -> list[tuple[int, int]]:
    rows = []
    for window in training_windows(shards, num_rows, seed):
        assert window.first_row == len(rows)
        rows += rows_of(window, shards)
    return rows[:num_rows]


@given(SIZES, st.integers(0, 3), st.integers(1, 20))
def test_every_epoch_has_every_row_once_and_scenes_stay_together(sizes, seed, window_rows):
    shards = shards_of(sizes)
    every = sorted((number, row) for number, shard in enumerate(shards) for scene in shard.scenes for row in scene)
    before, order.WINDOW_ROWS = order.WINDOW_ROWS, window_rows
    try:
        rows = order_of(shards, 2 * len(every) + 1, seed)
        read = [window.shards for window in training_windows(shards, len(every), seed)]
    finally:
        order.WINDOW_ROWS = before
    assert sorted(rows[: len(every)]) == sorted(rows[len(every) : -1]) == every
    assert sorted(itertools.chain.from_iterable(read)) == list(range(len(shards)))
    for number, shard in enumerate(shards):
        for scene in shard.scenes:
            first = rows.index((number, scene[0]))
            assert rows[first : first + len(scene)] == [(number, row) for row in scene]


def test_the_seed_and_the_epoch_give_the_order_and_it_mixes_shards():
    shards = shards_of([[2] * 32] * 8)
    rows = order_of(shards, 1024, seed=1)
    assert rows == order_of(shards, 1024, seed=1) != order_of(shards, 1024, seed=2)
    assert rows[:512] != rows[512:]
    assert len({number for number, _ in rows[:32]}) > 4
    assert order_of(shards, 100, seed=1) == rows[:100]


def test_an_evaluation_reads_every_shard_once_in_order():
    shards = shards_of([[2, 1], [3], [1, 1]])
    windows = evaluation_windows(shards)
    assert [window.first_row for window in windows] == [0, 3, 6]
    found = [row for window in windows for row in rows_of(window, shards)]
    assert found == sorted(found) and len(found) == 8


def test_a_photograph_is_held_back_by_its_name_alone():
    names = [f"scene-{number}" for number in range(5000)]
    held_back = {name for name in names if is_held_back(name, 0.1)}
    assert 400 < len(held_back) < 600
    assert held_back < {name for name in names if is_held_back(name, 0.2)}
    assert not any(is_held_back(name, 0.0) for name in names)
