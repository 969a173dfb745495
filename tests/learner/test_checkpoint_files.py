"""What is said when the disk takes no more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sif_ray.learner.checkpoint_files import told_by_the_disk

# The limit of the process on the size of a file stands in for the end of a disk: both end a write half-way.
SAVE = """
import resource, sys
from pathlib import Path
import torch
from sif_ray.learner.checkpoint_files import told_by_the_disk

folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, 2**19))
with told_by_the_disk(folder):
    torch.save(torch.zeros(2**20), folder / "weights.pt")
"""


def test_torch_does_not_say_that_the_disk_is_full_but_we_do(tmp_path):
    done = subprocess.run([sys.executable, "-c", SAVE, str(tmp_path)], capture_output=True, text=True, timeout=120)
    *_, last = done.stderr.splitlines()
    assert done.returncode == 1 and last == f"OSError: [Errno 27] File too large: '{tmp_path}'"
    torchs_own = done.stderr.partition("During handling of the above exception, another exception occurred")[0]
    assert "RuntimeError" in torchs_own and "too large" not in torchs_own


def test_other_errors_stay_what_they_are(tmp_path: Path):
    with pytest.raises(RuntimeError, match="out of memory"), told_by_the_disk(tmp_path / "new"):
        raise RuntimeError("out of memory")
    assert list(tmp_path.rglob("*")) == [tmp_path / "new"]
