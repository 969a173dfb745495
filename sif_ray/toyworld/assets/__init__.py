"""Committed toy checkpoints: folders in the Hugging Face layout, a few megabytes together."""

from __future__ import annotations

from pathlib import Path


def path(name: str) -> Path:
    """The folder of the checkpoint `name`: "tiny_policy" or "tiny_depth"."""
    return Path(__file__).parent / name
