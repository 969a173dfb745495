"""What the manifest counts, summed up from the summaries of shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

FACTS_SCHEMA = pa.schema(
    [
        ("scene_id", pa.string()),
        ("split", pa.string()),
        ("question_type", pa.string()),
        ("depth_source", pa.string()),
        ("reasons", pa.list_(pa.string())),
    ]
)
"""What is counted of a row. No reasons = accepted."""


class Counts:
    """Sums facts of rows up. Of every photograph it keeps the id.

    Example: `counts.add([{"scene_id": "toy-1", "split": "train", "reasons": [], ...}])`.
    """

    def __init__(self) -> None:
        self.accepted = 0
        self.rejected = 0
        self._reasons: Counter[str] = Counter()
        self._splits: dict[str, dict[str, Any]] = {}

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Count rows with the columns of `FACTS_SCHEMA`."""
        for row in rows:
            empty = {
                "scenes": set(),
                "accepted": 0,
                "rejected": 0,
                "question_types": Counter(),
                "depth_sources": Counter(),
            }
            split = self._splits.setdefault(row["split"], empty)
            split["scenes"].add(row["scene_id"])
            self._reasons.update(row["reasons"])
            if row["reasons"]:
                self.rejected += 1
                split["rejected"] += 1
            else:
                self.accepted += 1
                split["accepted"] += 1
                split["question_types"][row["question_type"]] += 1
                split["depth_sources"][row["depth_source"]] += 1

    def total(self) -> dict[str, Any]:
        """{"scenes", "accepted", "rejected", "splits": {split: the same and "question_types", "depth_sources"},
        "reasons"}, in an order that does not depend on that of the shards."""
        splits = {
            name: {
                **split,
                "scenes": len(split["scenes"]),
                "question_types": dict(sorted(split["question_types"].items())),
                "depth_sources": dict(sorted(split["depth_sources"].items())),
            }
            for name, split in sorted(self._splits.items())
        }
        return {
            "scenes": sum(split["scenes"] for split in splits.values()),
            "accepted": self.accepted,
            "rejected": self.rejected,
            "splits": splits,
            "reasons": dict(sorted(self._reasons.items())),
        }
