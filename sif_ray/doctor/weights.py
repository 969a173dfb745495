"""The weight files of a checkpoint folder, on a disk or in an object store, by their names, headers and sizes.

A safetensors file is 8 bytes with the length of its header, the header as JSON, and the tensors at the offsets that it
states (the format's own description): whether a file is whole is known without reading a tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from sif_ray.policy.shards import INDEX, SINGLE
from sif_ray.storage import Folder

LENGTH_BYTES = 8
LARGEST_HEADER = 100_000_000  # bytes, the format's own limit


def weight_faults(folder: Folder) -> Iterator[str]:
    """Every weight file that is missing or cut off."""
    names = sorted(set(_index(folder).values())) or [SINGLE]
    there = set(folder.names())
    for name in names:
        if name not in there:
            yield f"{name} is missing"
        elif why := _cut_off(folder, name):
            yield f"{name} {why}"


def _index(folder: Folder) -> dict[str, str]:
    """The file of every tensor; empty where one file has them all."""
    return json.loads(folder.read(INDEX))["weight_map"] if folder.exists(INDEX) else {}


def _cut_off(folder: Folder, name: str) -> str:
    with folder.filesystem.open_input_file(folder.path_of(name)) as file:
        size = file.size()
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or length > LARGEST_HEADER:
            return "is no safetensors file"
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return f"is cut off or damaged: its header of {length} bytes cannot be read"
    ends = [tensor["data_offsets"][1] for tensor_name, tensor in header.items() if tensor_name != "__metadata__"]
    wanted = LENGTH_BYTES + length + max(ends, default=0)
    return f"is cut off: it has {size} of {wanted} bytes" if size < wanted else ""
