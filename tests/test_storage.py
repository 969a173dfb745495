"""Folders on a disk and in a real S3 server: the same answers, files whole or not at all, and clear refusals."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from object_store import ObjectStore, object_store

from sif_ray.config import ConfigError
from sif_ray.storage import Folder, reach


@pytest.fixture(scope="module")
def s3() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture(params=["disk", "s3"])
def folder(request, tmp_path, s3) -> Folder:
    place = tmp_path / "deep" / "set" if request.param == "disk" else s3.url(f"deep/{request.function.__name__}")
    return Folder.open(place)


def test_files_are_written_read_listed_and_removed(folder):
    assert folder.names() == [] and not folder.exists("a.bin")
    folder.check_writable()
    folder.write("b.bin", b"two")
    folder.write("a.bin", b"one")
    folder.write("a.bin", b"ONE")
    folder.child("data").write("00000.parquet", b"three")
    folder.write_json("plan.json", {"rows": 3})
    assert folder.names() == ["a.bin", "b.bin", "data", "plan.json"]
    assert folder.child("data").names() == ["00000.parquet"]
    assert (folder.read("a.bin"), folder.read_json("plan.json")) == (b"ONE", {"rows": 3})
    assert folder.exists("data") and folder.child("data").exists("00000.parquet")
    folder.remove("a.bin")
    folder.remove("a.bin")
    with pytest.raises(FileNotFoundError):
        folder.read("a.bin")
    folder.child("data").clear()
    assert folder.child("data").names() == []
    folder.child("nowhere").clear()


def test_a_folder_travels_to_workers_and_names_its_children(folder):
    folder.write("a.bin", b"one")
    assert pickle.loads(pickle.dumps(folder)).read("a.bin") == b"one"
    child = Folder.open(folder.child("data").url)
    child.write("x", b"1")
    assert folder.child("data").read("x") == b"1"


def test_a_relative_path_and_a_url_without_query_are_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Folder.open("runs/data").write("x", b"1")
    assert Folder.open(f"file://{tmp_path}/runs/data").read("x") == b"1"
    assert Folder.open("runs").child("data").url == "runs/data"


def write_forever(path: Path) -> None:
    folder = Folder.open(path)
    while True:
        for value in (b"a", b"b"):
            folder.write("file", value * 200_000)


def test_a_killed_writer_leaves_a_whole_file_and_its_part_is_swept_away(tmp_path):
    context = multiprocessing.get_context("spawn")
    for _ in range(3):
        writer = context.Process(target=write_forever, args=(tmp_path,))
        writer.start()
        while not (tmp_path / "file").exists():
            assert writer.is_alive()
        while not list(tmp_path.glob(".file.*")):  # in the middle of a write, as far as one can tell
            assert writer.is_alive()
        writer.kill()
        writer.join()
        assert (tmp_path / "file").read_bytes() in (b"a" * 200_000, b"b" * 200_000)
    folder = Folder.open(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".00000.parquet.0f.part").write_bytes(b"PAR1")
    assert folder.names() == ["data", "file"]
    folder.remove_parts()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "file"]


def test_writers_of_one_file_do_not_mix(folder):
    contents = [bytes([number]) * 100_000 for number in range(8)]
    writers = [threading.Thread(target=folder.write, args=("file", content)) for content in contents]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert folder.read("file") in contents
    assert folder.names() == ["file"]


def test_places_that_cannot_work_are_refused_with_their_key(tmp_path, s3):
    with pytest.raises(ConfigError, match=r"output = 'ftp://host/x' cannot be reached: .*check the address"):
        Folder.open("ftp://host/x", "output")
    with pytest.raises(ConfigError, match=r"output = 's3://absent/x.*cannot be written: .*bucket does not exist"):
        Folder.open(s3.url("x", bucket="absent"), "output").check_writable("output")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output = .*file' is a file; name a folder"):
        Folder.open(tmp_path / "file", "output")
    with pytest.raises(ConfigError, match=r"output = .* cannot be written"):
        Folder.open(tmp_path / "file" / "below", "output").check_writable("output")
    with pytest.raises(ConfigError, match=r"input = 'nfs2:///x' cannot be reached"):
        reach("nfs2:///x", "input")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_without_rights_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written"):
        Folder.open(tmp_path / "data").check_writable()
