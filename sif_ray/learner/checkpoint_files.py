"""Files of a learner's checkpoint: why they cannot be written, whether they are what was written, and what a rank keeps
beside DeepSpeed's."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from sif_ray.policy.torch_files import is_intact

PROBE_BYTES = 2**20


@contextlib.contextmanager
def told_by_the_disk(folder: Path) -> Iterator[None]:
    """Raise the `OSError` of a disk that takes no more where the body's error does not say so: torch writes through
    streams that drop the reason ("iostream error")."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except RuntimeError:
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(PROBE_BYTES))
        except OSError as reason:
            raise OSError(reason.errno, reason.strerror, str(folder)) from reason
        raise


def damaged_files(files: Sequence[Path]) -> list[str]:
    """Those whose bytes are not what was written; every rank reads a share and gets the same list."""
    mine = [str(path) for path in files[dist.get_rank() :: dist.get_world_size()] if not is_intact(path)]
    of_ranks: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, mine)
    return [path for found in of_ranks for path in found]


def rank_file(rank: int) -> str:
    """Name of what a rank writes beside DeepSpeed's files."""
    return f"rank{rank}.pt"


def random_state() -> dict[str, Tensor]:
    """State of this process's generators, by kind of device; see `set_random_state`."""
    devices = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state(), **devices}


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Go on drawing as the process would have from which `random_state` took it."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
