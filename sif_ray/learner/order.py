"""The order in which a warm-up sees the rows of a dataset: a pure function of the seed, whatever reads them.

Epoch after epoch the shards are drawn in a random order and put together to windows of at least `WINDOW_ROWS` rows, and
the scenes of a window are mixed. A window is what one task reads, each shard once an epoch. Row number p of the run is
trained in step p // batch_size, so a run can go on from any step, on any number of ranks, without asking what was read.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW_ROWS = 1024  # mixed with each other; the encoded images of so many rows are in memory at once, per reader


@dataclass(frozen=True)
class Shard:
    """The rows of one file that a run reads, scene by scene: rows of one image are neighbours."""

    file: str
    scenes: tuple[tuple[int, ...], ...]  # row numbers in the file

    @property
    def num_rows(self) -> int:
        return sum(map(len, self.scenes))


@dataclass(frozen=True)
class Window:
    """Shards whose scenes are mixed, and where their rows stand in the run."""

    name: str  # of its random numbers; "" = the scenes stay in order
    first_row: int  # rows of the run before it
    shards: tuple[int, ...]  # numbers in the list of shards


def training_windows(shards: Sequence[Shard], num_rows: int, seed: int) -> list[Window]:
    """Windows with the first `num_rows` rows of a run, over as many epochs as that takes."""
    found: list[Window] = []
    first_row = epoch = 0
    while first_row < num_rows:
        order = list(range(len(shards)))
        random.Random(f"{seed} {epoch}").shuffle(order)
        for chosen in _filled(order, shards):
            found.append(Window(f"{seed} {epoch} {chosen[0]}", first_row, chosen))
            first_row += sum(shards[number].num_rows for number in chosen)
        epoch += 1
    return [window for window in found if window.first_row < num_rows]


def evaluation_windows(shards: Sequence[Shard]) -> list[Window]:
    """All shards once, a window for each, in order."""
    found, first_row = [], 0
    for number, shard in enumerate(shards):
        found.append(Window("", first_row, (number,)))
        first_row += shard.num_rows
    return found


def rows_of(window: Window, shards: Sequence[Shard]) -> list[tuple[int, int]]:
    """(number of the shard, row in its file) of every row of a window, in the order of the run."""
    scenes = [(number, scene) for number in window.shards for scene in shards[number].scenes]
    if window.name:
        random.Random(window.name).shuffle(scenes)
    return [(number, row) for number, scene in scenes for row in scene]


def is_held_back(scene_id: str, eval_share: float) -> bool:
    """Whether the photograph belongs to the evaluation: the same ones in every run, also when the dataset grows."""
    drawn = int.from_bytes(hashlib.sha256(scene_id.encode()).digest()[:8]) / 2**64
    return drawn < eval_share


def _filled(order: Sequence[int], shards: Sequence[Shard]) -> list[tuple[int, ...]]:
    """Neighbours in `order` in groups of at least `WINDOW_ROWS` rows, but for the last group."""
    groups: list[tuple[int, ...]] = []
    group: list[int] = []
    for number in order:
        group.append(number)
        if sum(shards[chosen].num_rows for chosen in group) >= WINDOW_ROWS:
            groups.append(tuple(group))
            group = []
    return [*groups, tuple(group)] if group else groups
