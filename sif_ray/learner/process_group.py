"""The process group of the learner's ranks."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from types import ModuleType

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=10)  # of one collective; a rank that died is noticed after it at the latest


def open_store(host: str) -> dist.TCPStore:
    """The store at which ranks meet, on a free port of this machine; `store.port` tells the others which."""
    return dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)


def reach_store(host: str, port: int) -> dist.TCPStore:
    """The store that another rank has opened."""
    return dist.TCPStore(host, port, is_master=False, timeout=TIMEOUT)


def join(rank: int = 0, world_size: int = 1, store: dist.Store | None = None) -> None:
    """Join the ranks (NCCL where the process sees a GPU, else gloo) unless the process is in a group already.

    `store` None = a group of one, which needs no port.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if dist.is_initialized():
        return
    if store is None and world_size > 1:
        raise ValueError(f"world_size = {world_size}: several ranks need a store to meet at (open_store)")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    store = dist.HashStore() if store is None else store
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)


def load_deepspeed() -> ModuleType:
    """The `deepspeed` module, told which device the process has and to compile nothing."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")  # an actor sees only its own GPU
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # Its shared-memory all-reduce would be compiled at first use and need a C++ compiler; gloo serves as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
