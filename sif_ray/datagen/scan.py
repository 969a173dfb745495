"""Columns of a dataset's shards as a stream: what is read does not stay in memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads

from sif_ray.datagen.drafts import DRAFT_SCHEMA, SHARDS
from sif_ray.storage import Folder

_BATCH_ROWS = 256
_SHARDS_AHEAD = 4  # read while the ones before are worked on


def scan(folder: Folder, columns: Sequence[str]) -> Iterator[tuple[str, pa.RecordBatch]]:
    """(name of the shard, batch of its rows with `columns`) over the shards in `folder`, in their order.

    `folder` is `data` or `rejected` of a dataset; other shards may be written meanwhile.
    """
    paths = [folder.path_of(name) for name in folder.names()]
    if not paths:
        return
    rows = pads.dataset(paths, schema=DRAFT_SCHEMA, format=SHARDS, filesystem=folder.filesystem)
    scanner = rows.scanner(columns=list(columns), batch_size=_BATCH_ROWS, fragment_readahead=_SHARDS_AHEAD)
    for found in scanner.scan_batches():
        yield found.fragment.path.rsplit("/", 1)[1], found.record_batch


def read_rows(folder: Folder, shard: str, sample_ids: Collection[str]) -> list[dict[str, Any]]:
    """The rows of one shard with these ids, whole, in the order of the shard."""
    rows = pads.dataset(folder.path_of(shard), schema=DRAFT_SCHEMA, format=SHARDS, filesystem=folder.filesystem)
    found: list[dict[str, Any]] = rows.to_table(filter=pads.field("sample_id").isin(list(sample_ids))).to_pylist()
    return found
