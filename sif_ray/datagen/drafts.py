"""A row on its way through the pipeline: every stage adds to it, or says why it is refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads

from sif_ray.records import SAMPLE_SCHEMA, Sample, sample_from_row, sample_to_row


@dataclass(frozen=True)
class Draft:
    """A sample in the making. With reasons it is refused: later stages leave it as it is, and it is written so."""

    sample: Sample  # what is known so far; boxes are in `sample.source_frame` until the picture is decoded
    names: tuple[str, ...] = ()  # of the evidence, one per box
    reasons: tuple[str, ...] = ()  # stable words, which are counted
    depth_gray: bytes = b""  # 8-bit grayscale PNG of depth_rel, 0 = near; empty until depth is known

    def refused(self, *reasons: str) -> Draft:
        """This draft with further reasons."""
        return replace(self, reasons=(*self.reasons, *reasons))


DRAFT_SCHEMA = (
    SAMPLE_SCHEMA.append(pa.field("names", pa.list_(pa.string())))
    .append(pa.field("reasons", pa.list_(pa.string())))
    .append(pa.field("depth_gray", pa.binary()))
)
"""Arrow schema of drafts, which is that of a shard: the fields of `Sample`, then those of `Draft`."""


SHARDS = pads.ParquetFileFormat(
    default_fragment_scan_options=pads.ParquetFragmentScanOptions(page_checksum_verification=True)
)
"""How shards are read: bytes that a disk changed are an error, and no other rows."""


def drafts_to_table(drafts: list[Draft]) -> pa.Table:
    """A table of `DRAFT_SCHEMA`."""
    return pa.Table.from_pylist([_to_row(draft) for draft in drafts], schema=DRAFT_SCHEMA)


def drafts_from_table(table: pa.Table) -> list[Draft]:
    """The inverse of `drafts_to_table`; columns that a draft does not know are ignored."""
    return [
        Draft(sample_from_row(row), tuple(row["names"]), tuple(row["reasons"]), row["depth_gray"])
        for row in table.to_pylist()
    ]


def _to_row(draft: Draft) -> dict[str, Any]:
    return {
        **sample_to_row(draft.sample),
        "names": list(draft.names),
        "reasons": list(draft.reasons),
        "depth_gray": draft.depth_gray,
    }
