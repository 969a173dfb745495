"""Weights over a real process group: every worker gets the bytes of the version that it asks for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from sif_ray.rollout.errors import WeightSyncError
from sif_ray.rollout.weights import WeightUpdate, make_update, read_tensors
from sif_ray.rollout.wire import BACKEND_KEY, Outbox, open_store, receive_buckets

HOST = "127.0.0.1"


def _tensors(version: int) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(version)
    return [(f"layers.{i}.weight", torch.randn(5 + i, 7, generator=generator)) for i in range(6)]


def _send(host: str, port: int, num_workers: int) -> Any:
    raise AssertionError("nobody asks here")


def _published(outbox: Outbox, version: int) -> WeightUpdate:
    named = _tensors(version)
    return outbox.hold(make_update(version, [named[:2], named[2:]]), _send)


def _on_gpu(index: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a thread whose GPU is number `index`, where there are GPUs: NCCL wants one for each rank."""
    if torch.cuda.is_available():
        torch.cuda.set_device(index)
    return function(*arguments)


@pytest.mark.parametrize(
    ("backend", "num_workers"),
    [
        ("gloo", 1),
        ("gloo", 2),
        pytest.param(
            "nccl",
            1,
            marks=[pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")],
        ),
    ],
)
def test_every_worker_gets_the_version_it_asks_for(backend: str, num_workers: int) -> None:
    outbox = Outbox(backend)
    updates = {version: _published(outbox, version) for version in (1, 2, 3)}
    for version in (2, 3, 2):  # also by an engine that joins late
        store = open_store(HOST)
        manifest = {"host": HOST, "port": store.port, "num_bytes": updates[version].buckets}
        with ThreadPoolExecutor(num_workers + 1) as threads:
            sending = threads.submit(_on_gpu, 0, outbox.send, version, HOST, store.port, num_workers)
            receiving = [
                threads.submit(_on_gpu, 1 + k, receive_buckets, manifest, k, num_workers) for k in range(num_workers)
            ]
            sending.result()
        assert store.get(BACKEND_KEY) == backend.encode()
        for buckets in (future.result() for future in receiving):
            read = dict(read_tensors(updates[version].tensors, buckets))
            assert all(torch.equal(read[name], tensor) for name, tensor in _tensors(version))


def test_an_update_that_is_sent_says_the_sizes_of_its_buckets() -> None:
    outbox = Outbox("gloo")
    update = _published(outbox, 1)
    plain = make_update(1, [_tensors(1)[:2], _tensors(1)[2:]])
    assert update.buckets == tuple(np.asarray(bucket).nbytes for bucket in plain.buckets)
    assert (update.checksum, update.num_bytes, update.send) == (plain.checksum, plain.num_bytes, _send)


def test_a_version_that_is_gone_is_refused_before_anybody_waits() -> None:
    outbox = Outbox("gloo")
    for version in (1, 2, 3):
        _published(outbox, version)
    store = open_store(HOST)
    with pytest.raises(WeightSyncError, match=r"version 1 is not held any more, only \[2, 3\]"):
        outbox.send(1, HOST, store.port, 1)
    assert not store.check([BACKEND_KEY])
