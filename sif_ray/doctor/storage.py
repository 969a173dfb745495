"""Folders that a run writes, on disks and in buckets."""

from __future__ import annotations

import fcntl
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from sif_ray.doctor.finding import Finding, fault, ok
from sif_ray.doctor.machine import disk_findings, existing
from sif_ray.doctor.need import Place
from sif_ray.storage import Folder

LOCK = ".lock"  # of sif_ray.observe.run_folder.kept_to_itself

_CREDENTIALS = "for a bucket see the variables of its provider (AWS_ACCESS_KEY_ID, AWS_PROFILE, ...)"
_FIXES = {
    "write": f"create it, or give this user or key the right to write; {_CREDENTIALS}",
    "read": f"give the key the right to read; {_CREDENTIALS}",
    "delete": f"give the key the right to delete, as old checkpoints are removed; {_CREDENTIALS}",
}


def output_findings(output: Place) -> Iterator[Finding]:
    """Write, read and delete a small file where a run is to write. Creates no folder on a disk.

    Raises `ConfigError` for a place that cannot be reached.
    """
    check = f"folder: {output.field}"
    folder = Folder.open(output.place, output.field)
    if folder.is_local:
        wanted = Path(folder.path)
        yield from _in_use(check, wanted)
        yield from disk_findings(output.field, wanted)
        folder = Folder.open(existing(wanted), output.field)
    yield _probe(check, folder, output.place)


def _probe(check: str, folder: Folder, place: str) -> Finding:
    name, content, step = f".probe-{uuid.uuid4().hex}", uuid.uuid4().bytes, "write"
    try:
        folder.write(name, content)
        step = "read"
        found = folder.read(name)
        step = "delete"
        folder.remove(name)
    except (pa.ArrowException, OSError) as error:
        return fault(check, f"{place}: cannot {step} a file there: {error}", _FIXES[step])
    if found != content:
        return fault(check, f"{place}: reads back other bytes than were written", "choose another place")
    return ok(check, f"{place}: can be written, read and deleted")


def _in_use(check: str, folder: Path) -> Iterator[Finding]:
    """Whether another run holds the lock of a folder, which `kept_to_itself` takes."""
    if not (folder / LOCK).is_file():
        return
    with (folder / LOCK).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fix = "wait for its end, or choose another output"
            yield fault(check, f"{folder}: another run is at work in it", fix)
