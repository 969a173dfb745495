"""The rows of a warm-up on their way to the ranks, through Ray Data.

    windows ─► read (tasks: encoded rows of one step and rank) ─► encode (tasks: token ids, patches) ─► ranks

Images are decoded and texts tokenised here, away from the processes that train. Blocks keep their order and each is one
share of a step; a share says which step it belongs to, so a step is whole whichever rank gets which of its shares.
"""

from __future__ import annotations

import functools
import itertools
import pickle
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback

from sif_ray.config import PromptConfig
from sif_ray.datagen.dataset import damage_named
from sif_ray.learner.microbatches import spread
from sif_ray.learner.order import Shard, Window, rows_of
from sif_ray.learner.rows import Scene, Share, encode_share, scenes
from sif_ray.policy.processor import PolicyProcessor
from sif_ray.records import SAMPLE_SCHEMA, sample_from_row
from sif_ray.storage import Folder

READERS = 2  # windows that are read at once: the next one while this one is trained
READER_CPUS, ENCODER_CPUS = 0.5, 1.0  # logical CPUs of a task; there is one encoder for each rank
SHARES_AHEAD = 2  # that a rank holds ready
LOOP_PAUSE_S = 0.02


@dataclass(frozen=True)
class RowStream:
    """Which rows to stream, in which order and how they are encoded."""

    folder: Folder  # of the shards
    shards: tuple[Shard, ...]
    windows: tuple[Window, ...]
    batch_size: int  # rows of a step
    policy: str
    prompt: PromptConfig
    max_pixels: int
    max_length: int

    @property
    def num_steps(self) -> int:
        """Steps that the rows of all windows make, the last one not full."""
        return -(-self._end(self.windows[-1]) // self.batch_size)

    def dataset(self, first_step: int, num_steps: int, num_ranks: int) -> ray.data.Dataset:
        """A pickled `Share` per row and block, in the order of the steps [first_step, num_steps), for each of which
        there are `num_ranks` in a row."""
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        context.target_max_block_size = 1  # byte: every row becomes a block of its own
        context.custom_execution_callback_classes = [_Breathe]
        wanted = range(first_step * self.batch_size, num_steps * self.batch_size)
        ahead = [window for window in self.windows if self._end(window) > wanted.start]
        read = functools.partial(_read, stream=self, windows=ahead, wanted=wanted, num_shares=num_ranks)
        encode = functools.partial(_encode, stream=self)
        return (
            ray.data.range(len(ahead), override_num_blocks=len(ahead))
            .map_batches(
                read,
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=READER_CPUS,
                compute=ray.data.TaskPoolStrategy(size=READERS),
            )
            .map_batches(
                encode,
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=ENCODER_CPUS,
                compute=ray.data.TaskPoolStrategy(size=num_ranks),
            )
        )

    def _end(self, window: Window) -> int:
        return window.first_row + sum(self.shards[number].num_rows for number in window.shards)


class _Breathe(ExecutionCallback):
    """Ray Data's loop asks without a pause whether the ranks have taken a block, which costs half a core."""

    def on_execution_step(self, executor: object) -> None:
        time.sleep(LOOP_PAUSE_S)


class Feed:
    """What one rank is given, step by step.

    Example: `Feed(iterator).take(17).sequences`.
    """

    def __init__(self, iterator: ray.data.DataIterator) -> None:
        self._shares = _unpickled(iterator)
        self._next = next(self._shares, None)

    def take(self, step: int) -> Share:
        """The shares of a step, which must not lie before the last one asked for; it may have none for this rank."""
        taken = Share(step)
        while self._next is not None and self._next.step <= step:
            if self._next.step < step:
                raise RuntimeError(f"a share of step {self._next.step} came when step {step} was due")
            taken += self._next
            self._next = next(self._shares, None)
        return taken


def _unpickled(iterator: ray.data.DataIterator) -> Iterator[Share]:
    blocks = iterator.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=SHARES_AHEAD)
    for block in blocks:
        for share in block["share"]:
            yield pickle.loads(share.as_buffer())


def _read(
    numbers: pa.Table, stream: RowStream, windows: Sequence[Window], wanted: range, num_shares: int
) -> Iterator[pa.Table]:
    window = windows[numbers["id"][0].as_py()]
    places = [
        (position // stream.batch_size, *place)
        for position, place in enumerate(rows_of(window, stream.shards), start=window.first_row)
        if position in wanted
    ]
    with damage_named(stream.folder):
        tables = {
            number: pq.read_table(
                stream.folder.path_of(stream.shards[number].file),
                columns=SAMPLE_SCHEMA.names,
                filesystem=stream.folder.filesystem,
                page_checksum_verification=True,
            )
            for number in {number for _, number, _ in places}
        }
    for step, rows in itertools.groupby(places, key=lambda place: place[0]):
        samples = [sample_from_row(tables[number].slice(row, 1).to_pylist()[0]) for _, number, row in rows]
        for share in _shares(list(scenes(samples)), num_shares):
            yield _one_row(step, share)


def _shares(found: Sequence[Scene], num_shares: int) -> Iterable[Scene]:
    """The rows of whole scenes, spread evenly."""
    for chosen in spread([len(scene) for scene in found], num_shares):
        yield [sample for number in sorted(chosen) for sample in found[number]]


def _encode(block: pa.Table, stream: RowStream) -> pa.Table:
    step = block["step"][0].as_py()
    samples = pickle.loads(block["share"][0].as_buffer())
    processor = _processor(stream.policy, stream.max_pixels)
    return _one_row(step, encode_share(step, samples, processor, stream.prompt, stream.max_length))


@functools.cache  # a worker process of Ray serves many tasks
def _processor(policy: str, max_pixels: int) -> PolicyProcessor:
    return PolicyProcessor(policy, max_pixels)


def _one_row(step: int, share: Share | Scene) -> pa.Table:
    return pa.table({"step": [step], "share": [pickle.dumps(share, protocol=5)]})
