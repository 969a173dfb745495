"""JSON lines that survive a killed writer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TextIO


def open_for_append(path: Path) -> TextIO:
    """The file opened for whole lines; the line that a killed process left half written is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)
    return path.open("a", buffering=1, encoding="utf-8")


def to_line(record: dict[str, Any]) -> str:
    """One line of strict JSON; a number that is not finite becomes null."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole line of the file, in order; a last line without its end is still being written and left out."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n") and line.strip()]
