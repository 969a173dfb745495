"""How the rows of a dataset spread, counted from text columns while the shards go by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sif_ray.datagen.dataset import ACCEPTED, REJECTED
from sif_ray.datagen.scan import scan
from sif_ray.method.trace import AreaBox, find_areas
from sif_ray.storage import Folder

IntArray = npt.NDArray[np.int64]

SHARE_BINS = 20  # of positions and depths, which lie in [0, 1]
LOG_AREA_EDGES = np.linspace(-4, 0, 25)  # log10 of a box's share of the image; smaller ones count in the first bin

_VALUES = ("split", "dataset", "question_type", "source_frame", "depth_source")
_ACCEPTED_COLUMNS = ("sample_id", "scene_id", *_VALUES, "boxes", "width", "height", "trace")
_REFUSED_COLUMNS = ("sample_id", "question", "answer", *_VALUES, "boxes", "trace", "reasons")


@dataclass
class Tally:
    """Counts of a dataset, finished or not. Of each row it keeps the id."""

    num_accepted: int = 0
    num_refused: int = 0
    accepted: dict[str, Counter[str]] = field(default_factory=dict)  # by column: rows by value
    refused: dict[str, Counter[str]] = field(default_factory=dict)
    scene_ids: set[str] = field(default_factory=set)
    ids_by_dataset: dict[str, dict[str, str]] = field(default_factory=dict)  # accepted sample id: name of its shard
    num_boxes: int = 0
    areas: IntArray = field(default_factory=lambda: np.zeros(len(LOG_AREA_EDGES) - 1, np.int64))
    centres: IntArray = field(default_factory=lambda: np.zeros((SHARE_BINS, SHARE_BINS), np.int64))  # (down, right)
    evidence_depths: IntArray = field(default_factory=lambda: np.zeros(SHARE_BINS, np.int64))  # mean in an evidence box
    image_depths: IntArray = field(default_factory=lambda: np.zeros(SHARE_BINS, np.int64))  # mean of the whole image
    looks: Counter[int] = field(default_factory=Counter)  # rows by number of areas in the trace
    trace_chars: Counter[int] = field(default_factory=Counter)  # rows by length
    sides_px: Counter[int] = field(default_factory=Counter)  # rows by longer side
    reasons: Counter[str] = field(default_factory=Counter)
    refused_rows: dict[str, dict[str, Any]] = field(default_factory=dict)  # the first row of every reason

    def add_accepted(self, shard: str, batch: pa.RecordBatch) -> None:
        """Count rows of `data` with `_ACCEPTED_COLUMNS`."""
        self.num_accepted += batch.num_rows
        _count_values(self.accepted, batch)
        self.scene_ids.update(batch["scene_id"].to_pylist())
        for dataset, sample_id in zip(batch["dataset"].to_pylist(), batch["sample_id"].to_pylist(), strict=True):
            self.ids_by_dataset.setdefault(dataset, {})[sample_id] = shard
        self.trace_chars.update(pc.utf8_length(batch["trace"]).to_pylist())
        self.sides_px.update(pc.max_element_wise(batch["width"], batch["height"]).to_pylist())

        x1, y1, x2, y2 = batch["boxes"].flatten().flatten().to_numpy().reshape(-1, 4).T
        self.num_boxes += len(x1)
        shares = np.clip((x2 - x1) * (y2 - y1), 10 ** LOG_AREA_EDGES[0], 1.0)
        self.areas += np.histogram(np.log10(shares), LOG_AREA_EDGES)[0]
        centres, _, _ = np.histogram2d((y1 + y2) / 2, (x1 + x2) / 2, SHARE_BINS, [(0.0, 1.0), (0.0, 1.0)])
        self.centres += centres.astype(np.int64)

        # Forward frames begin with the whole image and end with the evidence, and the trace states the depth of each.
        areas = [found for trace in batch["trace"].to_pylist() if (found := find_areas(trace))]
        self.looks.update(map(len, areas))
        self.image_depths += _depth_counts(box for first, *_ in areas for box in first)
        self.evidence_depths += _depth_counts(box for *_, last in areas for box in last)

    def add_refused(self, batch: pa.RecordBatch) -> None:
        """Count rows of `rejected` with `_REFUSED_COLUMNS`."""
        self.num_refused += batch.num_rows
        _count_values(self.refused, batch)
        for row in batch.to_pylist():
            self.reasons.update(row["reasons"])
            for reason in row["reasons"]:
                self.refused_rows.setdefault(reason, row)


def tally(folder: Folder) -> Tally:
    """Count every shard that is there."""
    found = Tally()
    for shard, batch in scan(folder.child(ACCEPTED), _ACCEPTED_COLUMNS):
        found.add_accepted(shard, batch)
    for _, batch in scan(folder.child(REJECTED), _REFUSED_COLUMNS):
        found.add_refused(batch)
    return found


def _count_values(counts: dict[str, Counter[str]], batch: pa.RecordBatch) -> None:
    columns = {name: batch[name] for name in _VALUES}
    columns["boxes"] = pc.list_value_length(batch["boxes"])
    for name, column in columns.items():
        found = pc.value_counts(column)
        numbers = zip(found.field("values").to_pylist(), found.field("counts").to_pylist(), strict=True)
        counts.setdefault(name, Counter()).update({str(value): number for value, number in numbers})


def _depth_counts(boxes: Iterable[AreaBox]) -> IntArray:
    depths = [box.depth for box in boxes if box.depth is not None]
    return np.histogram(depths, SHARE_BINS, (0.0, 1.0))[0].astype(np.int64)
