"""A policy's weights on their way from the learner to the engines.

A `WeightUpdate` is a list of `TensorSpec`s and the buckets of bytes they point into. Everything an engine needs to
refuse a damaged update is in the specs; nothing is trusted because of where it came from. No vLLM or Ray here.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from sif_ray.rollout.errors import WeightSyncError

ByteArray = npt.NDArray[np.uint8]

ALIGNMENT_BYTES = 64  # every tensor starts at a multiple, so that its bytes can be viewed in place

_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class TensorSpec:
    """Where one tensor lies in an update, and what it must be.

    Example: `TensorSpec("lm_head.weight", "float32", (512, 128), 0xDEADBEEF, bucket=0, offset_bytes=4096)`.
    """

    name: str  # Hugging Face parameter name, as `named_parameters()` gives it
    dtype: str  # "float32", "bfloat16" or "float16"; the engine casts to its own
    shape: tuple[int, ...]
    checksum: int  # XXH3 over name, dtype, shape and raw bytes; see `tensor_checksum`
    bucket: int  # index into `WeightUpdate.buckets`
    offset_bytes: int  # of the first byte in the bucket

    @property
    def num_bytes(self) -> int:
        """Size of the tensor; raises `WeightSyncError` for another dtype than the three."""
        if self.dtype not in _DTYPES:
            raise WeightSyncError(f"{self.name}: dtype {self.dtype!r} is not one of {', '.join(_DTYPES)}")
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize


class SendBuckets(Protocol):
    """Has the learner send an update's buckets to the `num_workers` workers that wait at a store."""

    def __call__(self, host: str, port: int, num_workers: int) -> Awaitable[None]: ...


@dataclass(frozen=True)
class WeightUpdate:
    """All weights of one policy version.

    `buckets` are flat uint8 arrays or references to them (a Ray object store keeps one copy for every engine); where
    the learner sends them over a process group (`sif_ray.rollout.wire`), `send` asks it to and `buckets` are sizes.
    """

    version: int
    tensors: tuple[TensorSpec, ...]
    buckets: tuple[Any, ...]
    send: SendBuckets | None = None

    @property
    def checksum(self) -> int:
        """XXH3 over the checksums of all tensors; equal to that of a matching `Receipt`."""
        return update_checksum(self.tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, without padding."""
        return sum(spec.num_bytes for spec in self.tensors)


@dataclass(frozen=True)
class Receipt:
    """What an engine says about an update that it has loaded, before it generates with it."""

    version: int
    num_tensors: int
    num_bytes: int
    checksum: int  # computed by the engine's worker from the bytes that it loaded
    engine_id: str
    seconds: float  # from the call to the resumed generation
    pause_s: float  # part of `seconds` in which nothing was generated
    prompt_tokens: int = 0  # of the requests since the update before, each of a group's G counted
    computed_prompt_tokens: int = 0  # the part of them that no cache held
    encoded_images: int = 0  # since the update before


def make_update(
    version: int,
    buckets: Iterable[Sequence[tuple[str, torch.Tensor]]],
    put: Callable[[ByteArray], Any] | None = None,
) -> WeightUpdate:
    """Pack `buckets` of named CPU tensors into an update, one bucket at a time.

    `put` copies each packed bucket to where it is fetched from (`ray.put`), and its result is kept in place of the
    bytes: one buffer then serves them all, since fresh memory is dearer than the copy. Raises `WeightSyncError` for a
    tensor that is empty, of another type, or named twice.
    """
    specs: list[TensorSpec] = []
    packed: list[Any] = []
    room = np.empty(0, np.uint8)
    for index, bucket in enumerate(buckets):
        views = [(name, tensor, _bytes_of(name, tensor)) for name, tensor in bucket]
        size = sum(_aligned(view.size) for _, _, view in views)
        if put is None or room.size < size:
            room = np.zeros(size, np.uint8)
        data = room[:size]
        specs += _pack(index, views, data)
        packed.append(data if put is None else put(data))
    _refuse_duplicates(specs)
    return WeightUpdate(version, tuple(specs), tuple(packed))


def _pack(bucket: int, tensors: Sequence[tuple[str, torch.Tensor, ByteArray]], data: ByteArray) -> list[TensorSpec]:
    """Copy the bytes of tensors into `data`, one after the other."""
    specs = []
    offset = 0
    for name, tensor, view in tensors:
        data[offset : offset + view.size] = view
        dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        specs.append(TensorSpec(name, dtype, shape, tensor_checksum(name, dtype, shape, view), bucket, offset))
        offset += _aligned(view.size)
    return specs


def _bytes_of(name: str, tensor: torch.Tensor) -> ByteArray:
    if tensor.dtype not in _DTYPES.values():
        raise WeightSyncError(f"{name}: dtype {tensor.dtype} is not one of {', '.join(_DTYPES)}")
    if tensor.numel() == 0:
        raise WeightSyncError(f"{name}: has no elements; gather a ZeRO-3 parameter before it is packed")
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def tensor_checksum(name: str, dtype: str, shape: tuple[int, ...], data: ByteArray) -> int:
    """XXH3 (64 bits) over what a tensor is and its bytes: a tensor under another's name or type is found as well.

    It finds damage and mistakes, not forgery. It reads memory several times as fast as CRC-32, at several GB/s a core.
    """
    digest = xxhash.xxh3_64(repr((name, dtype, shape)).encode())
    digest.update(data)
    return digest.intdigest()


def update_checksum(specs: Iterable[TensorSpec]) -> int:
    """XXH3 over the checksums of all tensors, in order of name."""
    checksums = [spec.checksum for spec in sorted(specs, key=lambda spec: spec.name)]
    return xxhash.xxh3_64_intdigest(repr(checksums).encode())


def check_coverage(specs: Sequence[TensorSpec], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `WeightSyncError` unless `specs` name every expected tensor once, in its shape, and no other."""
    _refuse_duplicates(specs)
    names = {spec.name for spec in specs}
    for name in expected:
        if name not in names:
            raise WeightSyncError(
                f"{name}: missing from the update ({len(names)} tensors, the policy has {len(expected)}); "
                "publish every parameter of the policy"
            )
    for spec in specs:
        if spec.name not in expected:
            raise WeightSyncError(f"{spec.name}: the policy has no such tensor; is the update of another model?")
        if spec.shape != expected[spec.name]:
            raise WeightSyncError(f"{spec.name}: shape {spec.shape} in the update, {expected[spec.name]} in the policy")


def _refuse_duplicates(specs: Iterable[TensorSpec]) -> None:
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen:
            raise WeightSyncError(f"{spec.name}: appears twice in the update")
        seen.add(spec.name)


def read_tensors(specs: Iterable[TensorSpec], buckets: Sequence[ByteArray]) -> Iterator[tuple[str, torch.Tensor]]:
    """Views of the tensors in `buckets`, each checked against its spec first.

    Raises `WeightSyncError` for a bucket that is missing or too short and for bytes that differ from the checksum.
    """
    for spec in specs:
        if not 0 <= spec.bucket < len(buckets):
            raise WeightSyncError(f"{spec.name}: bucket {spec.bucket} of {len(buckets)} is missing")
        start, end = spec.offset_bytes, spec.offset_bytes + spec.num_bytes
        size = buckets[spec.bucket].size
        if start < 0 or start % ALIGNMENT_BYTES or end > size:
            raise WeightSyncError(
                f"{spec.name}: bytes {start} to {end} of bucket {spec.bucket}, which has {size} bytes"
            )
        data = buckets[spec.bucket][start:end]
        checksum = tensor_checksum(spec.name, spec.dtype, spec.shape, data)
        if checksum != spec.checksum:
            raise WeightSyncError(
                f"{spec.name}: checksum {checksum:016x} of {spec.dtype} {spec.shape}, {spec.checksum:016x} announced"
            )
        yield spec.name, torch.from_numpy(data).view(_DTYPES[spec.dtype]).view(spec.shape)


def specs_to_rows(specs: Iterable[TensorSpec]) -> list[list[Any]]:
    """Plain lists, for channels that carry no classes."""
    return [list(astuple(spec)) for spec in specs]


def specs_from_rows(rows: Iterable[Sequence[Any]]) -> list[TensorSpec]:
    """The inverse of `specs_to_rows`."""
    return [
        TensorSpec(name, dtype, tuple(shape), checksum, bucket, offset)
        for name, dtype, shape, checksum, bucket, offset in rows
    ]
