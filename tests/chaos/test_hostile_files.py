"""Files that somebody else wrote, or that a disk changed: read as they are, or refused by name. Never anything else.

What fuzzing has found is kept as examples beside the properties.
"""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sif_ray import config as configuration
from sif_ray.bench.toy_dataset import SPLIT, write_dataset
from sif_ray.checkpoints import CheckpointError, CheckpointFolder, digest_values
from sif_ray.config import ConfigError
from sif_ray.datagen.dataset import read_samples

STAGES = sorted(configuration.STAGES)
ONE_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)

KEYS = st.sampled_from(
    ["seed", "engine", "engine.threads", "judge", "data", "profile", "split", "trackers", "nonsense"]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["${seed}", "???", "1e999"]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=5), inner, max_size=3)
)

# --- configurations --------------------------------------------------------------------------------------------------


def loads_or_refuses(stage: str, path: Path, overrides: tuple[str, ...] = ()) -> None:
    try:
        configuration.load(stage, str(path), overrides)
    except ConfigError as error:
        assert overrides or path.name in str(error)


@ONE_FOLDER
@given(stage=st.sampled_from(STAGES), content=st.binary(max_size=200))
@example(stage="grpo", content=b"- a list\n")
@example(stage="grpo", content=b"just text")
@example(stage="grpo", content=b"\xff\xfe")
@example(stage="grpo", content=b"[" * 5000)
@example(stage="grpo", content=b"{a: " * 2000)
@example(stage="grpo", content=b"seed: !!python/object/apply:os.getpid []")
@example(stage="grpo", content=b"seed: !!timestamp 2026-13-45")
@example(stage="grpo", content=b"seed: 0x" + b"f" * 5000)
@example(stage="grpo", content=b"a: &a [*a]")
@example(stage="grpo", content=b"<<: 3")
@example(stage="grpo", content=b"? [1, 2]\n: 3")
def test_any_bytes_as_a_configuration(tmp_path, stage, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    loads_or_refuses(stage, path)


@ONE_FOLDER
@given(stage=st.sampled_from(STAGES), values=st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_values_in_a_configuration(tmp_path, stage, values):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(values))  # JSON is YAML
    loads_or_refuses(stage, path)


@ONE_FOLDER
@given(override=st.text(max_size=40))
@example(override="=")
@example(override="seed=[")
@example(override="a.b.c=${d}")
@example(override="engine=null")
def test_any_text_as_an_override(tmp_path, override):
    path = tmp_path / "config.yaml"
    path.write_text("seed: 1\n")
    loads_or_refuses("grpo", path, (override,))


def test_aliases_that_multiply_are_refused_before_they_do(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    path = tmp_path / "laughs.yaml"
    path.write_text("\n".join(lines))
    tracemalloc.start()
    with pytest.raises(ConfigError, match=r"laughs\.yaml"):
        configuration.load("grpo", str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_a_configuration_runs_no_code(tmp_path):
    path = tmp_path / "config.yaml"
    made = tmp_path / "made"
    path.write_text(f"data: !!python/object/apply:os.mkdir ['{made}']\n")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        configuration.load("grpo", str(path))
    assert not made.exists()


# --- datasets --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("hostile") / "data", 6)


CHANGES = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 1), st.just(b"")),
    st.tuples(st.just("overwrite"), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
)


def damaged(content: bytes, change: tuple[str, float, bytes]) -> bytes:
    kind, where, put = change
    at = round(where * len(content))
    if kind == "cut":
        return content[:at]
    return content[:at] + put + content[at + (len(put) if kind == "overwrite" else 0) :]


@ONE_FOLDER
@given(name=st.sampled_from(["manifest.json", "data/00000.parquet"]), change=CHANGES)
@example(name="manifest.json", change=("cut", 0.0, b""))
@example(name="data/00000.parquet", change=("cut", 0.0, b""))
@example(name="data/00000.parquet", change=("cut", 0.5, b""))
@example(name="data/00000.parquet", change=("overwrite", 0.5, b"\0\xff"))
def test_a_damaged_dataset_is_read_or_refused_by_name(dataset, tmp_path, name, change):
    copy = tmp_path / "data"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(dataset, copy)
    (copy / name).write_bytes(damaged((copy / name).read_bytes(), change))
    try:
        samples = read_samples(str(copy), SPLIT)
    except ConfigError as error:
        assert str(copy) in str(error)
    else:
        assert samples == read_samples(str(dataset), SPLIT)


@ONE_FOLDER
@given(manifest=VALUES)
@example(manifest={})
@example(manifest={"format": 1})
@example(manifest=[])
def test_any_manifest(dataset, tmp_path, manifest):
    copy = tmp_path / "data"
    if not copy.exists():
        shutil.copytree(dataset, copy)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=str(copy)):
        read_samples(str(copy), SPLIT)


# --- checkpoints -----------------------------------------------------------------------------------------------------


@ONE_FOLDER
@given(change=CHANGES)
@example(change=("insert", 0.0, b"["))
def test_a_damaged_state_is_the_same_or_refused_by_name(tmp_path, change):
    checkpoints = CheckpointFolder(tmp_path / "checkpoints", {"seed": 1}, keep=1)
    if checkpoints.newest() is None:
        part = checkpoints.begin(3)
        (part / "weights").write_bytes(os.urandom(100))
        checkpoints.complete(3, {"ledger": {"version": 3}})
    path = checkpoints.path(3) / "state.json"
    intact = path.read_bytes()
    path.write_bytes(damaged(intact, change))
    try:
        assert checkpoints.read(3)["ledger"] == {"version": 3}
    except CheckpointError as error:
        assert str(path) in str(error)
    finally:
        path.write_bytes(intact)


def test_a_state_of_another_format_is_refused_by_name(tmp_path):
    checkpoints = CheckpointFolder(tmp_path / "checkpoints", {"seed": 1}, keep=1)
    checkpoints.begin(3)
    checkpoints.complete(3, {})
    path = checkpoints.path(3) / "state.json"
    state = json.loads(path.read_text())
    del state["digest"]
    state["format"] = 2
    path.write_text(json.dumps(state | {"digest": digest_values(state)}))
    with pytest.raises(CheckpointError, match=r"step-000003/state.json: damaged \(format 2"):
        checkpoints.read(3)


def test_a_state_as_deep_as_memory_is_refused(tmp_path):
    checkpoints = CheckpointFolder(tmp_path / "checkpoints", {"seed": 1}, keep=1)
    checkpoints.begin(3)
    checkpoints.complete(3, {})
    (checkpoints.path(3) / "state.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.read(3)
