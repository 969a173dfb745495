"""One planted run for all tests that only read it."""

from __future__ import annotations

from pathlib import Path

import pytest
from planted_run import plant_run


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder to read, not to write."""
    return plant_run(tmp_path_factory.mktemp("runs") / "quickstart", num_scenes=24)
