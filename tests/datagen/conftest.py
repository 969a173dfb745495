"""One small dataset for all tests that read one."""

from __future__ import annotations

import pytest
from small_dataset import SmallDataset, make_small_dataset


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> SmallDataset:
    """Tests read it and write beside it."""
    work = tmp_path_factory.mktemp("small")
    return make_small_dataset(str(work / "data"), work)
