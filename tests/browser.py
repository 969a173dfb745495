"""Pages as a real browser draws them."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from PIL import Image

ARTEFACTS = Path(__file__).resolve().parents[1] / "artefacts"  # screenshots for people; not in the repository
needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")

_OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
    "--disable-background-networking --disable-component-update --disable-sync"
)


def screenshot(page: Path, name: str, width: int, height: int, dark: bool = False) -> Image.Image:
    """The top `height` px of a page, also kept as `artefacts/NAME.png`."""
    ARTEFACTS.mkdir(exist_ok=True)
    shot = ARTEFACTS / f"{name}.png"
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        subprocess.run(
            [
                "chromium",
                *_OPTIONS.split(),
                f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                f"--user-data-dir={profile}",
                f"--screenshot={shot}",
                f"--window-size={width},{height}",
                page.as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )
    return Image.open(shot).convert("RGB")


def num_saturated_colours(picture: Image.Image) -> int:
    """How many colours are far from grey: photographs and depth maps have dozens that no text or background has."""
    colours = picture.getcolors(1 << 24) or []
    return sum(max(pixel) - min(pixel) > 90 for _, pixel in colours)
