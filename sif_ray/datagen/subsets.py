"""Named subsets of a dataset's accepted rows, which are lists of sample ids in subsets.json."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sif_ray.config import GenerateConfig
from sif_ray.datagen.selection import HELDOUT, stratified

SAMPLED = "sampled"
COLUMNS = ("sample_id", "dataset", "split", "boxes")


def draw_subsets(batches: Iterable[pa.RecordBatch], config: GenerateConfig) -> dict[str, dict[str, Any]]:
    """What subsets.json holds: {"sampled": {"seed": ..., "sample_ids": [...]}}, nothing if `config.subset_rows` is 0.

    The rows are drawn evenly over the datasets, those with several boxes as strata of their own: with one box in every
    row nothing would train the matching of boxes. Held-out rows are never drawn, as the subset is to train on.

    Args:
        batches: the accepted rows, with `COLUMNS`.
    """
    if config.subset_rows == 0:
        return {}
    ids_by_stratum: dict[str, list[str]] = {}
    for batch in batches:
        counts = pc.list_value_length(batch["boxes"]).to_pylist()
        rows = zip(*(batch[name].to_pylist() for name in ("sample_id", "dataset", "split")), counts, strict=True)
        for sample_id, dataset, split, num_boxes in rows:
            if split != HELDOUT:
                stratum = f"{dataset}, several boxes" if num_boxes > 1 else dataset
                ids_by_stratum.setdefault(stratum, []).append(sample_id)
    drawn = stratified(ids_by_stratum, config.subset_rows, config.seed)
    return {SAMPLED: {"seed": config.seed, "sample_ids": drawn}}
