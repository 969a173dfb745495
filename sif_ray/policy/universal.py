"""DeepSpeed's universal checkpoint: one file per weight and optimiser state, for any number of ranks."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

import torch


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


def mend_optimizer(optimizer: torch.optim.Optimizer, weight_decays: Sequence[float]) -> None:
    """Give every group of weights its own count of steps and its own weight decay again.

    Where DeepSpeed 0.19 loads a universal checkpoint under ZeRO-3, all groups share one tensor that counts the steps,
    which torch's optimisers count up once per group, and all have the settings of the first group.
    """
    for state in optimizer.state.values():
        state["step"] = state["step"].clone()
    for group, weight_decay in zip(optimizer.param_groups, weight_decays, strict=True):
        group["weight_decay"] = weight_decay
