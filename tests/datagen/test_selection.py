"""Which annotations become rows, against the same rules computed on whole lists."""

from __future__ import annotations

import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sif_ray.config import GenerateConfig, SelectConfig
from sif_ray.datagen.annotations import Annotation, Picture
from sif_ray.datagen.selection import even_shares, select, stratified, unique_ids


def annotation(number: int, dataset: str = "gqa", **changes) -> Annotation:
    row = Annotation(f"{dataset}-{number}", dataset, "", f"{number}.jpg", "What?", "", "cup", ((0, 0, 1, 1),), "image")
    return replace(row, **changes)


@dataclass(frozen=True)
class Listed:
    """A source of a list."""

    rows: tuple[Annotation, ...]

    def annotations(self) -> Iterator[Annotation]:
        return iter(self.rows)

    def open(self, annotation: Annotation) -> Picture:
        raise AssertionError("a selection opens no picture")


def selected(rows: list[Annotation], seed: int = 0, heldout_share: float = 0.0, **rules) -> list[Annotation]:
    config = GenerateConfig(seed=seed, heldout_share=heldout_share, select=SelectConfig(**rules))
    return list(select(Listed(tuple(rows)), config))


rows_of_any_kind = st.lists(
    st.builds(
        annotation,
        st.integers(0, 30),
        st.sampled_from(["gqa", "vsr", "cub", "docvqa", ""]),
        error=st.sampled_from(["", "", "", "json_broken"]),
    ),
    max_size=60,
)
caps = {"max_per_dataset": st.integers(0, 8), "max_rows": st.integers(0, 20)}


# --- ids -------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(rows_of_any_kind)
def test_every_row_has_an_id_of_its_own(rows):
    found = list(unique_ids(rows))
    assert len({row.sample_id for row in found}) == len(found) == len(rows)
    seen = set()
    for before, after in zip(rows, found, strict=True):
        if before.sample_id not in seen:
            assert after == before
        else:
            assert after.sample_id.startswith(f"{before.sample_id}#")
            assert after == replace(before, sample_id=after.sample_id, error=before.error or "id_duplicate")
        seen.add(before.sample_id)


def test_an_id_that_looks_like_that_of_a_second_row_stays_unique():
    rows = [annotation(1, sample_id=name) for name in ("a", "a#2", "a", "a", "a#2")]
    assert [row.sample_id for row in unique_ids(rows)] == ["a", "a#2", "a#3", "a#4", "a#2#2"]


# --- caps ------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(rows_of_any_kind, *caps.values())
def test_the_released_order_takes_the_first_ones(rows, max_per_dataset, max_rows):
    found = selected(rows, order="first", drop_datasets=["docvqa"], max_per_dataset=max_per_dataset, max_rows=max_rows)
    left = [row for row in unique_ids(row for row in rows if row.dataset != "docvqa") if not row.error]
    capped = [
        row
        for place, row in enumerate(left)
        if not max_per_dataset or sum(other.dataset == row.dataset for other in left[:place]) < max_per_dataset
    ]
    expected = capped[:max_rows] if max_rows else capped
    assert [row.sample_id for row in found if not row.error] == [row.sample_id for row in expected]


@settings(deadline=None, max_examples=200)
@given(rows_of_any_kind, *caps.values(), st.integers(0, 3))
def test_a_draw_is_even_within_its_caps(rows, max_per_dataset, max_rows, seed):
    found = selected(rows, seed, max_per_dataset=max_per_dataset, max_rows=max_rows)
    unique = list(unique_ids(rows))
    order = {row.sample_id: place for place, row in enumerate(unique)}
    assert [order[row.sample_id] for row in found] == sorted(order[row.sample_id] for row in found)
    assert [row.sample_id for row in found if row.error] == [row.sample_id for row in unique if row.error]
    available = Counter(row.dataset for row in unique if not row.error)
    most = {name: min(count, max_per_dataset or count) for name, count in available.items()}
    counts = Counter(row.dataset for row in found if not row.error)
    assert counts.total() == min(sum(most.values()), max_rows or sum(most.values()))
    for name, count in most.items():  # who has less than another has no more to give
        assert counts[name] == count or counts[name] >= max(counts.values()) - 1


@settings(deadline=None)
@given(
    st.dictionaries(st.text(max_size=3), st.sets(st.text(max_size=4), max_size=12)), st.integers(0, 40), st.randoms()
)
def test_a_draw_does_not_depend_on_the_order(ids_by_stratum, num, rng):
    ids_by_stratum = {stratum: {f"{stratum}/{name}" for name in names} for stratum, names in ids_by_stratum.items()}
    drawn = stratified(ids_by_stratum, num, seed=0)
    strata = list(ids_by_stratum)
    rng.shuffle(strata)
    shuffled = {stratum: sorted(ids_by_stratum[stratum], key=lambda _: rng.random()) for stratum in strata}
    assert stratified(shuffled, num, seed=0) == drawn == sorted(drawn)
    # against a draw from whole lists: every stratum's own order, cut at its share
    shares = even_shares({stratum: len(names) for stratum, names in ids_by_stratum.items()}, num, seed=0)
    expected = [
        name for stratum, names in ids_by_stratum.items() for name in stratified({"": names}, shares[stratum], 0)
    ]
    assert drawn == sorted(expected)


def test_what_is_drawn_is_spread_over_the_file_and_another_seed_draws_others():
    rows = [annotation(number) for number in range(2000)]
    one, other = ({row.sample_id for row in selected(rows, seed, max_rows=200)} for seed in (0, 1))
    assert len(one) == len(other) == 200 and 5 < len(one & other) < 45  # 20 by chance
    numbers = [int(sample_id.split("-")[1]) for sample_id in one]
    assert all(20 < sum(start <= number < start + 400 for number in numbers) < 60 for start in range(0, 2000, 400))


@pytest.mark.parametrize(
    ("available", "num", "expected"),
    [
        ({"a": 10, "b": 10}, 6, [3, 3]),
        ({"a": 1, "b": 10, "c": 10}, 9, [1, 4, 4]),
        ({"a": 2, "b": 1}, 9, [2, 1]),
        ({"a": 5, "b": 5, "c": 5}, 0, [0, 0, 0]),
        ({}, 3, []),
    ],
)
def test_shares_are_even(available, num, expected):
    assert list(even_shares(available, num, seed=0).values()) == expected
    uneven = even_shares({"a": 9, "b": 9, "c": 9}, 10, seed=0)
    assert sorted(uneven.values()) == [3, 3, 4]


def test_datasets_are_kept_and_dropped_and_what_names_none_stays():
    rows = [annotation(number, name) for number, name in enumerate(["gqa", "vsr", "docvqa", "", "gqa"])]
    assert [row.dataset for row in selected(rows, datasets=["gqa", "docvqa"], drop_datasets=["docvqa"])] == [
        "gqa",
        "",
        "gqa",
    ]
    assert [row.dataset for row in selected(rows, drop_datasets=["docvqa"])] == ["gqa", "vsr", "", "gqa"]


# --- splits ----------------------------------------------------------------------------------------------------------


def test_no_picture_is_in_two_splits():
    rows = [annotation(number, image=f"{number % 500}.jpg") for number in range(1500)]
    found = selected(rows, heldout_share=0.2)
    splits = defaultdict(set)
    for row in found:
        splits[row.image].add(row.split)
    assert all(len(names) == 1 for names in splits.values())
    heldout = sum(names == {"heldout"} for names in splits.values())
    assert 70 < heldout < 130  # of 500, a fifth on average
    assert {row.split for row in selected(rows)} == {"train"}
    assert [row.split for row in selected(rows[::-1], heldout_share=0.2)] == [row.split for row in found][::-1]
    again = selected(rows, seed=1, heldout_share=0.2)
    assert [row.split for row in again] != [row.split for row in found]


def test_a_source_that_names_its_splits_keeps_them():
    rows = [annotation(1, split="val"), annotation(2, split="test")]
    assert [row.split for row in selected(rows, heldout_share=0.9)] == ["val", "test"]


# --- memory ----------------------------------------------------------------------------------------------------------


class Long:
    """A source that is far longer than what is drawn from it."""

    num_rows = 15_000

    def annotations(self) -> Iterator[Annotation]:
        for number in range(self.num_rows):
            yield annotation(number, f"set{number % 40}")


def test_a_draw_keeps_ids_and_no_annotations():
    config = GenerateConfig(select=SelectConfig(max_rows=1000))
    tracemalloc.start()
    try:
        assert sum(1 for _ in select(Long(), config)) == 1000
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most / Long.num_rows < 200  # bytes; an annotation takes five times that
