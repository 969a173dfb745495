"""The index of a dataset: which annotation becomes a row of which shard, fixed before the first row is made.

index/00000.parquet ...  annotations, `rows_per_shard` in each, the last one may have fewer
plan.json                written last: the index is complete, and belongs to this content
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sif_ray.config import ConfigError, GenerateConfig
from sif_ray.datagen.annotations import ANNOTATION_SCHEMA, Annotation, annotation_from_row, annotation_to_row
from sif_ray.datagen.content import hash_of, refuse_other_content
from sif_ray.datagen.dataset import FORMAT, INDEX, PLAN
from sif_ray.datagen.shards import shard_name, table_bytes
from sif_ray.observe.progress import Progress
from sif_ray.storage import Folder


@dataclass(frozen=True)
class Plan:
    """How many rows a dataset gets and how they are cut into shards."""

    num_rows: int
    rows_per_shard: int

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.rows_per_shard)

    def rows_in(self, shards: Iterable[int]) -> int:
        """Rows of some shards together."""
        return sum(min(self.rows_per_shard, self.num_rows - shard * self.rows_per_shard) for shard in shards)


def read_plan(folder: Folder, content: dict[str, Any]) -> Plan | None:
    """The plan of a run into `folder` that was begun; None where its index is not complete.

    Raises `DatasetError`, which names the keys, where it was begun with other content.
    """
    if not folder.exists(PLAN):
        return None
    found = folder.read_json(PLAN)
    refuse_other_content(folder, found, content)
    return Plan(found["num_rows"], found["content"]["rows_per_shard"])


def write_plan(
    folder: Folder, annotations: Iterable[Annotation], config: GenerateConfig, content: dict[str, Any]
) -> Plan:
    """Write the index of `annotations`, of which one shard at a time is in memory, and the plan.

    Raises `ConfigError` if there are none.
    """
    index = folder.child(INDEX)
    index.clear()
    num_rows = 0
    with Progress("annotations", unit="rows") as progress:
        for shard, rows in enumerate(_chunks(map(annotation_to_row, annotations), config.rows_per_shard)):
            index.write(shard_name(shard), table_bytes(pa.Table.from_pylist(rows, schema=ANNOTATION_SCHEMA)))
            num_rows += len(rows)
            progress.advance(len(rows))
    if num_rows == 0:
        raise ConfigError(f"source = {config.source!r}: no annotation is left of it; widen select or change input")
    plan = Plan(num_rows, config.rows_per_shard)
    state = {"format": FORMAT, "config": asdict(config), "config_hash": hash_of(content), "content": content}
    folder.write_json(PLAN, state | {"num_rows": num_rows, "num_shards": plan.num_shards})
    return plan


def read_shard(folder: Folder, shard: int) -> list[Annotation]:
    """What a shard is made of."""
    rows = pq.read_table(pa.BufferReader(folder.child(INDEX).read(shard_name(shard)))).to_pylist()
    return [annotation_from_row(row) for row in rows]


def _chunks(rows: Iterable[dict[str, Any]], size: int) -> Iterable[list[dict[str, Any]]]:
    iterator = iter(rows)
    return iter(lambda: list(itertools.islice(iterator, size)), [])
