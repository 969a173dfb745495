"""Whether files of torch are what was written. torch itself does not look at the checksums in them."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

from sif_ray.config import ConfigError


def is_intact(path: Path) -> bool:
    """Reads the whole file."""
    try:
        with zipfile.ZipFile(path) as content:
            return content.testzip() is None
    except Exception:  # noqa: BLE001  # zipfile raises a dozen kinds for bytes that are no archive
        return False


def check_intact(files: Sequence[Path]) -> None:
    """Read `files` of a training checkpoint before an export. Raises `ConfigError` that names the first that is
    damaged."""
    for path in files:
        if not is_intact(path):
            raise ConfigError(
                f"{path}: damaged (its bytes are not those that were written); export the checkpoint before it"
            )
