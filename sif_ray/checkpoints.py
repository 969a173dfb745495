"""Checkpoint folders: there whole or not at all, and of one run.

    checkpoints/
      step-000012/          the state after 12 steps; `state.json` is written last
      .step-000016.part/    one that was not completed: ignored, and removed by the next run

A checkpoint is written under another name, flushed to the disk and renamed. What a disk lost afterwards is found when
it is read, and is an error that names the file: falling back in silence would repeat work that was done. Removing the
folder falls back on purpose.

On several machines the output folder must be one that every learner rank reaches.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sif_ray.config import ConfigError, StageConfig
from sif_ray.observe.run_folder import write_json

log = logging.getLogger(__name__)

FORMAT = 1
STATE = "state.json"
FINISHED = "finished.json"  # beside the checkpoints, written by a run that came to its end
MAX_NAMED_KEYS = 8  # in an error message


class CheckpointError(ConfigError):
    """A checkpoint that is damaged, or of a run with other settings."""


class CheckpointFolder:
    """The checkpoints of one run with `settings` (`flat_settings` and what else must agree); the newest `keep` stay.

    Example:
        checkpoints = CheckpointFolder(Path("runs/warmup/checkpoints"), settings, keep=2)
        part = checkpoints.begin(12)
        engine.save_checkpoint(str(part / "learner"), {})
        checkpoints.complete(12, {"best": None})
        step = checkpoints.newest()  # None without a checkpoint
        state = checkpoints.read(step)
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], keep: int) -> None:
        self._folder, self.settings, self._keep = folder, settings, keep

    def newest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return max(self._steps(), default=None)

    def path(self, step: int) -> Path:
        """Where the files of a checkpoint are."""
        return self._folder / f"step-{step:06d}"

    def part(self, step: int) -> Path:
        """Where they are until it is complete."""
        path = self.path(step)
        return path.with_name(f".{path.name}.part")

    def begin(self, step: int) -> Path:
        """An empty folder for the files of a checkpoint, until `complete`."""
        part = self.part(step)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        return part

    def complete(self, step: int, state: Mapping[str, Any]) -> None:
        """Add `state` (plain values) to the files that were written since `begin`; from now on the checkpoint counts.
        The oldest ones beyond `keep` are removed."""
        part = self.part(step)
        saved = {
            "format": FORMAT,
            "step": step,
            **state,
            "files": {str(file.relative_to(part)): file.stat().st_size for file in _files(part)},
            "settings": self.settings,
        }
        write_json(part / STATE, saved | {"digest": digest_values(saved)})
        for entry in (*part.rglob("*"), part):
            _flush(entry)
        part.rename(self.path(step))
        _flush(self._folder)
        for old in sorted(self._steps())[: -self._keep]:
            self.path(old).rename(self.part(old))  # at once: half of it, after a kill, would pass for a checkpoint
            shutil.rmtree(self.part(old))

    def read(self, step: int) -> dict[str, Any]:
        """The state of a checkpoint whose files all have their sizes.

        Raises `CheckpointError` naming the file that is damaged or the settings that differ.
        """
        path = self.path(step)
        try:
            saved: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
            intact = saved.pop("digest") == digest_values(saved)
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            raise self.damaged(path / STATE, repr(error)) from error
        if not intact:
            raise self.damaged(path / STATE, "its values are not those that were written")
        if (saved["format"], saved["step"]) != (FORMAT, step):
            raise self.damaged(path / STATE, f"format {saved['format']} or step {saved['step']}")
        refuse_other_settings(saved["settings"], self.settings, str(path))
        for name, size in saved["files"].items():
            found = (path / name).stat().st_size if (path / name).is_file() else None
            if found != size:
                raise self.damaged(path / name, "missing" if found is None else f"{found} bytes of {size}")
        return saved

    def remove_all(self) -> None:
        """Remove every checkpoint."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def remove_incomplete(self) -> None:
        """Remove what a killed run did not complete."""
        for part in self._folder.glob(".step-*"):
            shutil.rmtree(part)

    def damaged(self, file: Path, why: str) -> CheckpointError:
        """The error for a file of a checkpoint."""
        folder = self._folder / file.relative_to(self._folder).parts[0]
        return CheckpointError(
            f"{file}: damaged ({why}); remove the folder {folder} to continue from the checkpoint before it, or set "
            "resume=false to start over"
        )

    def _steps(self) -> list[int]:
        return [int(path.name.removeprefix("step-")) for path in self._folder.glob("step-*")]


def finished_before(output: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the run with these settings has come to its end in `output`.

    Raises `CheckpointError` naming the settings in which the one that has differs.
    """
    path = output / FINISHED
    if not path.is_file() or not (output / "checkpoint").is_dir():
        return False
    try:
        finished = json.loads(path.read_text(encoding="utf-8"))
        steps, of_run = int(finished["version"]), dict(finished["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: damaged ({error!r}); remove it to go on from the newest checkpoint, which writes it again"
        ) from error
    refuse_other_settings(of_run, settings, str(path))
    log.info("%s: finished before, after %d steps; resume=false runs it again", output, steps)
    return True


def remove_leftovers(output: Path, checkpoints: CheckpointFolder, resume: bool, growing: Iterable[str]) -> None:
    """Remove what is incomplete and, when there is nothing to continue from, what an earlier run left in `output`: its
    checkpoints and the files and folders that grow while a run does."""
    checkpoints.remove_incomplete()
    if resume and checkpoints.newest() is not None:
        return
    checkpoints.remove_all()
    for path in (output / name for name in (*growing, FINISHED)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


# --- settings --------------------------------------------------------------------------------------------------------


def flat_settings(config: StageConfig, may_change: Collection[str]) -> dict[str, Any]:
    """{"group_size": 8, "learner.zero_stage": 2, ...}: all but the keys and blocks that `may_change` while a run is
    continued, as JSON reads them back."""
    flat = {
        key: value
        for key, value in _flat("", asdict(config))
        if not any(key == name or key.startswith(f"{name}.") for name in may_change)
    }
    return dict(json.loads(json.dumps(flat)))


def refuse_other_settings(saved: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Raise `CheckpointError` naming the settings in which a run differs from the one found at `where`."""
    changed = [key for key in sorted(saved.keys() | now.keys()) if saved.get(key) != now.get(key)]
    if changed:
        named = "; ".join(f"{key} = {now.get(key)!r}, was {saved.get(key)!r}" for key in changed[:MAX_NAMED_KEYS])
        more = f"; and {len(changed) - MAX_NAMED_KEYS} more" if len(changed) > MAX_NAMED_KEYS else ""
        raise CheckpointError(
            f"{where} is of a run with other settings ({named}{more}): set them back to continue it, choose another "
            "output, or set resume=false to start over, which removes its checkpoints"
        )


def digest_files(files: Iterable[Path]) -> str:
    """One hash of names and contents."""
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            whole.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def digest_folder(folder: Path) -> str:
    """One hash of all files below `folder`."""
    return digest_files(_files(folder))


def digest_values(values: Mapping[str, Any]) -> str:
    """One hash of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _flat(prefix: str, block: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in block.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", value


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
