"""A policy in an object store is copied once per machine, again when it changed, and never found half."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from object_store import ObjectStore, object_store
from pyarrow import fs

from sif_ray.config import ConfigError
from sif_ray.policy.check import check_policy
from sif_ray.policy.fetch import CACHE_ENV, fetch
from sif_ray.toyworld.assets import path


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    with object_store() as opened:
        yield opened


def upload(store: ObjectStore, folder: Path) -> str:
    url = store.url("models/policy")
    target, key = fs.FileSystem.from_uri(url)
    fs.copy_files(str(folder), key, source_filesystem=fs.LocalFileSystem(), destination_filesystem=target)
    return url


def test_a_policy_is_copied_once_however_many_ask_at_once(store):
    url = upload(store, path("tiny_policy"))
    with ThreadPoolExecutor(4) as pool:
        [folder] = set(pool.map(fetch, [url] * 4))
    first = (folder / "config.json").stat().st_ino
    assert check_policy(url) == str(folder)
    assert (folder / "config.json").stat().st_ino == first
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        file.name: file.read_bytes() for file in path("tiny_policy").iterdir() if file.is_file()
    }


def test_a_policy_that_changed_is_copied_again_and_a_copy_that_was_killed_is_made_anew(store):
    url = upload(store, path("tiny_policy"))
    old = fetch(url)
    target, key = fs.FileSystem.from_uri(url)
    with target.open_output_stream(f"{key}/generation_config.json") as file:
        file.write(b"{}")
    new = fetch(url)
    assert new != old
    assert (new / "generation_config.json").read_bytes() == b"{}"
    half = new.with_suffix(".part")
    new.rename(half)
    (half / "config.json").write_bytes(b"")
    assert fetch(url) == new
    assert (new / "config.json").read_bytes() == (path("tiny_policy") / "config.json").read_bytes()
    assert not half.exists()


def test_a_folder_that_is_empty_is_refused(store):
    with pytest.raises(ConfigError, match=r"policy = 's3://bucket/nothing.*is empty or not there; name the folder"):
        fetch(store.url("nothing"))
