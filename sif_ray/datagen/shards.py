"""The shards of a dataset: how one is committed.

data/00000.parquet      accepted rows, written last of a shard, even when it has none: the shard is done
rejected/00000.parquet  refused rows, only if there are any
"""

from __future__ import annotations

import hashlib
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sif_ray.datagen.counts import FACTS_SCHEMA
from sif_ray.datagen.dataset import ACCEPTED, REJECTED
from sif_ray.datagen.drafts import Draft, drafts_to_table
from sif_ray.storage import Folder

Summary = dict[str, Any]
"""Of a shard that is done: {"shard": 7, "files": [{"name": "data/00007.parquet", "rows": 64, "sha256": "..."}],
"rows": [the facts that `Counts` counts]}."""


class ShardError(RuntimeError):
    """A shard came out with other rows than went in: a defect, which must not be written."""


def shard_name(shard: int) -> str:
    """E.g. "00007.parquet"."""
    return f"{shard:05d}.parquet"


def is_done(folder: Folder, shard: int) -> bool:
    """Whether the shard was committed."""
    return folder.child(ACCEPTED).exists(shard_name(shard))


def commit(folder: Folder, shard: int, drafts: list[Draft], sample_ids: list[str]) -> Summary:
    """Write the rows of a shard and return its summary. Of a shard that is done already the first rows stay.

    Raises `ShardError` unless `drafts` are exactly the rows `sample_ids` of the index, in that order.
    """
    if is_done(folder, shard):
        return summarise(folder, shard)
    found = [draft.sample.sample_id for draft in drafts]
    if found != sample_ids:
        raise ShardError(
            f"shard {shard}: {len(found)} rows {found[:3]} where its index has {len(sample_ids)}, {sample_ids[:3]}"
        )
    name = shard_name(shard)
    refused = [draft for draft in drafts if draft.reasons]
    if refused:
        folder.child(REJECTED).write(name, table_bytes(drafts_to_table(refused)))
    else:
        folder.child(REJECTED).remove(name)  # of an attempt that was killed before it wrote the accepted rows
    accepted = [draft for draft in drafts if not draft.reasons]
    folder.child(ACCEPTED).write(name, table_bytes(drafts_to_table(accepted)))
    return summarise(folder, shard)


def table_bytes(table: pa.Table) -> bytes:
    """The table as a Parquet file, with the checksums that `SHARDS` looks at. Equal rows give equal bytes: there is no
    time in it, nor a name."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=True)
    return bytes(sink.getvalue())


def summarise(folder: Folder, shard: int) -> Summary:
    """The summary of a shard that is done, from what is stored of it."""
    files, rows = [], []
    name = shard_name(shard)
    for kind in (ACCEPTED, REJECTED):
        if kind == REJECTED and not folder.child(kind).exists(name):
            continue
        content = folder.child(kind).read(name)
        table = pq.read_table(pa.BufferReader(content), columns=FACTS_SCHEMA.names)
        digest = hashlib.sha256(content).hexdigest()
        files.append({"name": f"{kind}/{name}", "rows": table.num_rows, "sha256": digest})
        rows += table.to_pylist()
    return {"shard": shard, "files": files, "rows": rows}
