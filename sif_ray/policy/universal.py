"""DeepSpeed's universal checkpoint: one file per weight and optimiser state, for any number of ranks."""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path


def to_universal(source: Path, output: Path, workers: int = 1) -> None:
    """Convert the files that ZeRO ranks wrote to the folder `source` (a tag of DeepSpeed's) to the new folder `output`.

    `workers` processes share the work, each with the states of a rank in memory.
    """
    from deepspeed.checkpoint import ds_to_universal

    settings = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(output),
        num_extract_workers=workers,
        num_merge_workers=workers,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        ds_to_universal.main(settings)
