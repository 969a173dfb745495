"""The score cache, from several processes."""

from __future__ import annotations

import multiprocessing

from sif_ray.judge.cache import ScoreCache


def write(path, worker: int) -> None:
    cache = ScoreCache(path)
    for i in range(60):
        cache.put(f"own-{worker}-{i}", i / 60)
        cache.put(f"shared-{i}", worker / 10)


def test_workers_share_one_file(tmp_path):
    path = tmp_path / "judge" / "cache.sqlite"
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=write, args=(path, worker)) for worker in range(2)]
    for process in workers:
        process.start()
    for process in workers:
        process.join(60)
    assert [process.exitcode for process in workers] == [0, 0]
    cache = ScoreCache(path)
    for i in range(60):
        assert cache.get(f"own-0-{i}") == cache.get(f"own-1-{i}") == i / 60
        assert cache.get(f"shared-{i}") in (0.0, 0.1)
    assert cache.get("never") is None


def test_the_first_verdict_stays(tmp_path):
    cache = ScoreCache(tmp_path / "cache.sqlite")
    cache.put("key", 0.0)
    cache.put("key", 1.0)
    assert ScoreCache(tmp_path / "cache.sqlite").get("key") == 0.0
