"""Whatever takes bytes from outside, on all that fuzzing began with and found; and, by name, fuzzed again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from targets import TARGETS

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
SECONDS = 60
LIMITS = ("-max_len=4096", "-timeout=20", "-rss_limit_mb=3000")


@pytest.mark.parametrize("file", sorted(CORPUS.glob("*/*")), ids=lambda file: f"{file.parent.name}/{file.name}")
def test_the_corpus_is_read_or_refused(file):
    """What is to be refused is called so."""
    assert TARGETS[file.parent.name](file.read_bytes()) == (not file.name.startswith("refused-"))


def test_every_target_has_a_corpus():
    assert {folder.name for folder in CORPUS.iterdir()} == set(TARGETS)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 240)
@pytest.mark.parametrize("name", TARGETS)
def test_fuzzing_finds_nothing(name, tmp_path):
    found, left = tmp_path / "found", tmp_path / "left"
    found.mkdir()
    left.mkdir()
    command = [sys.executable, str(HERE / "fuzz.py"), name, str(found), f"-max_total_time={SECONDS}", *LIMITS]
    done = subprocess.run(
        [*command, f"-artifact_prefix={left}/"],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    print(done.stderr[-200:])
    assert done.returncode == 0, f"{done.stderr[-3000:]}\n{[file.read_bytes() for file in left.iterdir()]}"
