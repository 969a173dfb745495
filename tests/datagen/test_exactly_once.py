"""Every row once, whatever dies and whenever: the commit of a shard, and whole runs that are killed or stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import ClassVar

import psutil
import pyarrow.dataset as pads
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sif_ray.config import ConfigError, GenerateConfig
from sif_ray.datagen import shards
from sif_ray.datagen.annotations import Annotation
from sif_ray.datagen.dataset import ACCEPTED, INDEX, MANIFEST, REJECTED, read_manifest
from sif_ray.datagen.drafts import Draft, drafts_from_table
from sif_ray.datagen.index import read_plan, read_shard, write_plan
from sif_ray.records import Sample
from sif_ray.storage import Folder

ROOT = Path(__file__).parents[2]
JOB, CONFIG = ROOT / "jobs" / "generate.py", ROOT / "configs" / "generate.yaml"
NUM_SCENES, ROWS_PER_SHARD = 1030, 64  # a scene has two questions, some have one


def draft(number: int, reasons: tuple[str, ...] = (), trace: str = "t") -> Draft:
    sample = Sample(
        sample_id=f"row-{number}",
        scene_id=f"scene-{number // 2}",
        dataset="d",
        split="train",
        question="q",
        question_type="count",
        answer="1",
        boxes=((0.0, 0.0, 0.5, 1.0),),
        width=4,
        height=3,
        image=bytes([number]) * 9,
        depth_image=b"",
        depth_source="exact",
        source_frame="image",
        trace=trace,
    )
    return Draft(sample, ("ball",), reasons)


def ids(drafts: list[Draft]) -> list[str]:
    return [item.sample.sample_id for item in drafts]


def stored(folder: Path) -> dict[str, tuple[str, ...]]:
    """Reasons by sample id over all shards, each id once."""
    found = [row for kind in (ACCEPTED, REJECTED) if (folder / kind).exists() for row in rows_of(folder / kind)]
    reasons = {row.sample.sample_id: row.reasons for row in found}
    assert len(reasons) == len(found)
    return reasons


def rows_of(folder: Path) -> list[Draft]:
    return drafts_from_table(pads.dataset(folder).to_table()) if any(folder.iterdir()) else []


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for kind in (ACCEPTED, REJECTED)
        for path in (folder / kind).glob("*")
    }


# --- one shard -------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


class DyingFolder(Folder):
    """Dies at the write whose number is `life`."""

    life: ClassVar[list[int]] = [0]

    def child(self, name: str) -> Folder:
        return DyingFolder(**vars(super().child(name)))

    def write(self, name: str, content: bytes) -> None:
        if self.life[0] == 0:
            raise Killed
        self.life[0] -= 1
        super().write(name, content)


Attempts = st.lists(st.tuples(st.lists(st.booleans(), min_size=3, max_size=3), st.integers(0, 2)), max_size=4)


@settings(deadline=None)  # it writes files
@given(attempts=Attempts, last=st.lists(st.booleans(), min_size=3, max_size=3))
def test_a_shard_holds_the_rows_of_the_attempt_that_finished_it(tmp_path_factory, attempts, last):
    """Attempts may refuse other rows, as a model teacher does, and die after any number of written files."""
    path = tmp_path_factory.mktemp("shard")
    folder = Folder.open(path)
    finished = None
    for refused, num_writes in [*attempts, (last, 2)]:
        drafts = [draft(number, ("nonsense",) if bad else ()) for number, bad in enumerate(refused)]
        dying = DyingFolder(**vars(folder))
        dying.life[0] = num_writes
        try:
            summary = shards.commit(dying, 3, drafts, ids(drafts))
        except Killed:
            assert not shards.is_done(folder, 3)
            continue
        finished = finished or {item.sample.sample_id: item.reasons for item in drafts}
        assert stored(path) == finished
        assert summary == shards.summarise(folder, 3)
        assert Counter(tuple(row["reasons"]) for row in summary["rows"]) == Counter(finished.values())


def test_equal_rows_are_equal_bytes_and_a_done_shard_is_left_alone(tmp_path):
    drafts = [draft(0), draft(1, ("image_missing",)), draft(2)]
    paths = [tmp_path / name for name in ("one", "two")]
    for path in paths:
        shards.commit(Folder.open(path), 0, drafts, ids(drafts))
        time.sleep(0.01)
    assert bytes_of(paths[0]) == bytes_of(paths[1])
    before = bytes_of(paths[0])
    others = [dataclasses.replace(item, reasons=()) for item in drafts]
    shards.commit(Folder.open(paths[0]), 0, others, ids(others))
    assert bytes_of(paths[0]) == before


def test_a_shard_without_accepted_rows_is_done_too(tmp_path):
    drafts = [draft(0, ("image_missing",))]
    summary = shards.commit(Folder.open(tmp_path), 0, drafts, ids(drafts))
    assert shards.is_done(Folder.open(tmp_path), 0)
    assert [file["rows"] for file in summary["files"]] == [0, 1]
    assert stored(tmp_path) == {"row-0": ("image_missing",)}


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[:-1],
        lambda rows: [*rows, rows[0]],
        lambda rows: [rows[1], rows[0], rows[2]],
        lambda rows: [*rows[:2], draft(9)],
        lambda rows: [],
    ],
    ids=["lost", "doubled", "swapped", "foreign", "all lost"],
)
def test_other_rows_than_those_of_the_index_are_not_written(tmp_path, change):
    drafts = [draft(number) for number in range(3)]
    with pytest.raises(shards.ShardError, match="shard 5"):
        shards.commit(Folder.open(tmp_path), 5, change(drafts), ids(drafts))
    assert list(tmp_path.iterdir()) == []


# --- the index -------------------------------------------------------------------------------------------------------


def annotations(count: int) -> list[Annotation]:
    return [
        Annotation(f"row-{number}", "d", "train", f"{number}.jpg", "q", "", "1", ((0.0, 1.0, 2.0, 3.0),), "pixels")
        for number in range(count)
    ]


def test_every_annotation_is_in_one_shard_in_its_order(tmp_path):
    config = GenerateConfig(rows_per_shard=4)
    folder = Folder.open(tmp_path)
    plan = write_plan(folder, annotations(10), config, {"rows_per_shard": 4})
    assert (plan.num_shards, plan.rows_in([0, 2])) == (3, 6)
    assert [row for shard in range(3) for row in read_shard(folder, shard)] == annotations(10)
    assert read_plan(folder, {"rows_per_shard": 4}) == plan
    with pytest.raises(ConfigError, match="rows_per_shard, seed differ; choose another output"):
        read_plan(folder, {"rows_per_shard": 5, "seed": 1})


def test_an_index_that_was_not_finished_is_no_plan_and_leaves_nothing(tmp_path):
    def breaks_off():
        yield from annotations(9)
        raise Killed

    folder = Folder.open(tmp_path)
    config, content = GenerateConfig(rows_per_shard=2), {"rows_per_shard": 2}
    with pytest.raises(Killed):
        write_plan(folder, breaks_off(), config, content)
    assert read_plan(folder, content) is None
    assert len(folder.child("index").names()) == 4
    write_plan(folder, annotations(3), config, content)
    assert folder.child("index").names() == ["00000.parquet", "00001.parquet"]


def test_a_source_without_annotations_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no annotation is left"):
        write_plan(Folder.open(tmp_path), [], GenerateConfig(), {})


# --- whole runs ------------------------------------------------------------------------------------------------------


class Run:
    """`sif-ray generate` of the toy world, with all of its Ray's processes."""

    def __init__(self, output: Path) -> None:
        self.folder = output / ACCEPTED
        overrides = [f"output={output}", f"splits={{train: {NUM_SCENES}}}", f"rows_per_shard={ROWS_PER_SHARD}"]
        command = [sys.executable, str(JOB), "--config", str(CONFIG), *overrides]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def finish(self) -> None:
        _, told = self.process.communicate()
        assert self.process.returncode == 0, told[-3000:]

    def kill_at(self, num_shards: int, delay_s: float) -> None:
        """SIGKILL every process of the run, `delay_s` after so many shards are there."""
        while len(list(self.folder.glob("[0-9]*"))) < num_shards:
            assert self.process.poll() is None, self.process.communicate()[1][-3000:]
            time.sleep(0.01)
        time.sleep(delay_s)
        processes = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()  # so that none sees another one die
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.communicate()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_killed_at_random_moments_makes_every_row_once_and_the_same_bytes(tmp_path):
    Run(tmp_path / "calm").finish()
    rng = random.Random(4)
    reached = []
    for num_shards in sorted(rng.sample(range(NUM_SCENES * 2 // ROWS_PER_SHARD - 2), 5)):
        Run(tmp_path / "killed").kill_at(num_shards, rng.uniform(0, 0.5))
        reached.append(len(list((tmp_path / "killed" / ACCEPTED).glob("[0-9]*"))))
    assert len(set(reached)) > 2, f"the kills came at {reached} shards: too close together to show anything"
    assert not (tmp_path / "killed" / MANIFEST).exists()
    Run(tmp_path / "killed").finish()
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "calm")
    index = pads.dataset(tmp_path / "killed" / INDEX).to_table(columns=["sample_id"])["sample_id"].to_pylist()
    assert len(index) >= 2000 and Counter(stored(tmp_path / "killed").keys()) == Counter(index)
    manifests = [read_manifest(tmp_path / name) for name in ("calm", "killed")]
    for key in ("counts", "shards", "config_hash"):
        assert manifests[0][key] == manifests[1][key]
    assert list((tmp_path / "killed").rglob(".*.part")) == []
