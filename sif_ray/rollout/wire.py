"""Weights sent from the learner to one engine over a process group of their own: gloo between CPUs, NCCL between GPUs.

The backends `gloo` and `nccl` of `weight_transfer`. The learner keeps what it published in host memory (`Outbox`); an
engine that wants it opens a store, and the learner's first rank and the engine's workers meet there, once per update.
So engines may join late, die and leave, and nothing but the engine's own update waits for it. Buckets cross the group
one after the other and are checked as those of the object store are.

The NCCL side has never run: it is the gloo side, which tests run, with the buckets on their way through GPU memory.
After `TIMEOUT` NCCL's own watchdog may end the process of a peer that waits for a dead one, a learner rank included.
"""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sif_ray.rollout.errors import WeightSyncError
from sif_ray.rollout.weights import ByteArray, SendBuckets, WeightUpdate

TIMEOUT = timedelta(seconds=120)  # to meet, and of one bucket
SENDER = 0  # the learner's rank in the group; the engine's workers follow
BACKEND_KEY = "backend"  # set in the store by the sender when it is there: until then nobody need wait in a group
KEPT_VERSIONS = 2  # an engine may still ask for the version before the newest


def open_store(host: str) -> dist.TCPStore:
    """The store at which the learner and the workers of an engine meet, on a free port of this machine."""
    return dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)


class Wire:
    """One end of the process group of one update, used for one direction: from the learner to the workers."""

    def __init__(self, host: str, port: int, rank: int, size: int, backend: str | None = None) -> None:
        """Meet the others at the store. The sender says the `backend`, "gloo" or "nccl" (on the process's GPU)."""
        store = dist.TCPStore(host, port, is_master=False, timeout=TIMEOUT)
        if backend is not None:
            store.set(BACKEND_KEY, backend)
        meeting = dist.PrefixStore("weights", store)
        if store.get(BACKEND_KEY) == b"nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = TIMEOUT
            self._device = torch.device("cuda", torch.cuda.current_device())
            self._group: Any = dist.ProcessGroupNCCL(meeting, rank, size, options)
        else:
            self._device = torch.device("cpu")
            self._group = dist.ProcessGroupGloo(meeting, rank, size, TIMEOUT)

    def send(self, bucket: ByteArray) -> None:
        self._group.broadcast(torch.from_numpy(bucket).to(self._device), SENDER).wait()

    def receive(self, num_bytes: int) -> ByteArray:
        bucket = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        self._group.broadcast(bucket, SENDER).wait()
        return bucket.cpu().numpy()

    def close(self) -> None:
        """Wait for what is on its way and leave the group."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self._group.shutdown()


@dataclass(frozen=True)
class SentByActor:
    """`SendBuckets` through the method `send` of a Ray actor that has an outbox."""

    actor: Any
    version: int

    def __call__(self, host: str, port: int, num_workers: int) -> Awaitable[None]:
        return self.actor.send.remote(self.version, host, port, num_workers)


class Outbox:
    """What a learner published last, in host memory, for engines that ask for it."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._buckets: dict[int, tuple[ByteArray, ...]] = {}

    def hold(self, update: WeightUpdate, send: SendBuckets) -> WeightUpdate:
        """Keep an update's buckets and forget older ones; returns it as engines get it, to be asked for by `send`."""
        self._buckets[update.version] = update.buckets
        for old in sorted(self._buckets)[:-KEPT_VERSIONS]:
            del self._buckets[old]
        return replace(update, buckets=tuple(bucket.nbytes for bucket in update.buckets), send=send)

    def send(self, version: int, host: str, port: int, num_workers: int) -> None:
        """Send the buckets of a version to the workers of one engine, which wait at the store."""
        if version not in self._buckets:
            raise WeightSyncError(f"version {version} is not held any more, only {sorted(self._buckets)}")
        wire = Wire(host, port, SENDER, 1 + num_workers, self.backend)
        for bucket in self._buckets[version]:
            wire.send(bucket)
        wire.close()


def receive_buckets(manifest: dict[str, Any], worker: int, num_workers: int) -> list[ByteArray]:
    """The buckets that the learner sends to worker number `worker` of an engine."""
    wire = Wire(manifest["host"], manifest["port"], 1 + worker, 1 + num_workers)
    buckets = [wire.receive(num_bytes) for num_bytes in manifest["num_bytes"]]
    wire.close()
    return buckets
