"""A checkpoint is there whole or not at all, comes back bit by bit, and belongs to one run."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from sif_ray.checkpoints import CheckpointError, finished_before
from sif_ray.config import ConfigError, EngineConfig, GrpoConfig, JudgeConfig, LearnerConfig
from sif_ray.loop.checkpoint import MAY_CHANGE, Checkpoints, RunState, run_settings
from sif_ray.loop.ledger import Ledger
from sif_ray.method.progress import ProgressRecord
from sif_ray.records import Rollout, RolloutGroup, Sample, ScoredGroup

IMAGES = {"p0": (b"rgb 0", b"depth 0"), "p1": (b"rgb 1", b"depth 1"), "p2": (b"rgb 2", b"depth 2")}


class FileLearner:
    """Writes files of given contents."""

    def __init__(self, contents: bytes = b"weights") -> None:
        self.contents = contents

    async def save_checkpoint(self, folder: str, client_state) -> None:
        rank = Path(folder) / "step" / "rank0.pt"
        rank.parent.mkdir(parents=True)
        rank.write_bytes(self.contents)


def make_group(name: str, seed: int) -> ScoredGroup:
    """Two rollouts of odd lengths with values that text would not keep."""
    rng = np.random.default_rng(seed)
    rollouts = tuple(
        Rollout(
            token_ids_T=rng.integers(0, 2**31 - 1, length).astype(np.int32),
            logprobs_T=-rng.exponential(3.0, length).astype(np.float32),
            version_spans=((3, 1), (5, length - 1)),
            finish_reason=reason,
            text=f'<think>"{seed}"\n\x00é</think>',
        )
        for length, reason in ((2, "stop"), (7, "length"))
    )
    ids = rng.integers(0, 1000, 5).astype(np.int32)
    group = RolloutGroup(f"0/{name}", name, ids, IMAGES[name], ((1, 4, 4), (1, 8, 2)), rollouts)
    rewards_G = rng.uniform(0, 4, 2).astype(np.float32)
    return ScoredGroup(group, rewards_G, {"box": rewards_G / 3, "answer_score": rewards_G / 7})


def make_state(version: int = 0, scored: tuple[str, ...] = ("p0", "p1")) -> RunState:
    """Of a run of three prompts in two epochs, with some groups scored; versions count on without training."""
    ledger = Ledger(
        list(IMAGES), epochs=2, groups_per_step=4, max_staleness=0, lease_timeout_s=1.0, now_s=lambda: 0.0, seed=1
    )
    record = ProgressRecord()
    while (lease := ledger.lease(0)) is not None:
        if lease.epoch == 0 and lease.sample_id in scored:
            ledger.generated(lease, 0)
            ledger.scored(lease)
            record.update(lease.sample_id, [0.1, 1 / 3], lease.epoch)
    groups = {f"0/{name}": make_group(name, seed) for seed, name in enumerate(scored)}
    return RunState(ledger.state_dict() | {"version": version}, record.state_dict(), groups)


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", {"group_size": 2}, keep=2)


def save(checkpoints: Checkpoints, state: RunState, learner: FileLearner | None = None) -> None:
    asyncio.run(checkpoints.save(state, learner or FileLearner()))


def load(checkpoints: Checkpoints, version: int) -> RunState:
    return checkpoints.load(version, IMAGES.__getitem__)


# --- contents --------------------------------------------------------------------------------------------------------


def assert_same(found: object, expected: object) -> None:
    """Equal in every field, type and bit."""
    assert type(found) is type(expected)
    if isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype and found.tobytes() == expected.tobytes()
    elif isinstance(expected, Rollout | RolloutGroup | ScoredGroup):
        for field in fields(expected):
            assert_same(getattr(found, field.name), getattr(expected, field.name))
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def test_state_comes_back_bit_by_bit(checkpoints):
    state = make_state()
    save(checkpoints, state)
    found = load(checkpoints, 0)
    assert_same(found.groups, state.groups)
    assert (found.ledger, found.record) == (state.ledger, state.record)
    rank = Path(checkpoints.learner_folder(0)) / "step" / "rank0.pt"
    assert rank.read_bytes() == b"weights"


def test_state_without_groups_comes_back(checkpoints):
    save(checkpoints, make_state(scored=()))
    assert load(checkpoints, 0).groups == {}


def test_images_are_not_written(checkpoints, tmp_path):
    save(checkpoints, make_state())
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"rgb 0" not in written and b"depth 1" not in written


# --- which are there -------------------------------------------------------------------------------------------------


def test_the_newest_are_kept(checkpoints, tmp_path):
    assert checkpoints.newest_version() is None
    for version in (4, 8, 12):
        save(checkpoints, make_state(version))
    assert checkpoints.newest_version() == 12
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000008", "step-000012"]


def test_old_one_that_a_kill_leaves_half_removed_does_not_count(checkpoints, monkeypatch):
    for version in (4, 8):
        save(checkpoints, make_state(version))

    def killed(path):
        (Path(path) / "state.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("sif_ray.checkpoints.shutil.rmtree", lambda path, **options: options or killed(path))
        save(checkpoints, make_state(12))
    assert checkpoints.newest_version() == 12
    for newest in (12, 8):
        shutil.rmtree(checkpoints.folder.path(newest))
    assert checkpoints.newest_version() is None
    checkpoints.folder.remove_incomplete()
    assert not list(checkpoints.folder.path(4).parent.iterdir())


def test_version_that_is_there_is_left_alone(checkpoints):
    save(checkpoints, make_state(4))
    save(checkpoints, make_state(4, scored=()), FileLearner(b"other"))
    assert len(load(checkpoints, 4).groups) == 2


@pytest.mark.parametrize("where", ["learner", "groups", "state", "flush"])
def test_failure_while_writing_leaves_the_checkpoint_before_it(checkpoints, monkeypatch, tmp_path, where):
    save(checkpoints, make_state(4))

    def fail(*arguments):
        raise OSError("no space left on device")

    class Full(FileLearner):
        async def save_checkpoint(self, folder, client_state):
            await super().save_checkpoint(folder, client_state)
            fail()

    writers = {
        "groups": "loop.checkpoint._write_groups",
        "state": "checkpoints.write_json",
        "flush": "checkpoints._flush",
    }
    target = writers.get(where)
    with monkeypatch.context() as patch:
        if target:
            patch.setattr(f"sif_ray.{target}", fail)
        with pytest.raises(OSError, match="no space left"):
            save(checkpoints, make_state(8), FileLearner() if target else Full())
    assert checkpoints.newest_version() == 4
    assert len(load(checkpoints, 4).groups) == 2
    assert (tmp_path / "checkpoints" / ".step-000008.part").is_dir()
    checkpoints.folder.remove_incomplete()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000004"]
    save(checkpoints, make_state(8))
    assert checkpoints.newest_version() == 8


def test_everything_is_on_the_disk_before_it_counts(checkpoints, monkeypatch):
    """A power cut may leave names without contents."""
    flushed: set[Path] = set()
    real_flush, real_rename = os.fsync, Path.rename

    def flush(handle):
        flushed.add(Path(os.readlink(f"/proc/self/fd/{handle}")))
        real_flush(handle)

    def rename(path, target):
        missing = {path, *path.rglob("*")} - flushed
        assert not missing, f"not on the disk: {missing}"
        return real_rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", flush)
        patch.setattr(Path, "rename", rename)
        save(checkpoints, make_state(4))
    folder = checkpoints.folder.path(4)
    assert flushed >= {folder.parent, folder.with_name(".step-000004.part") / "learner" / "step" / "rank0.pt"}


@pytest.mark.parametrize("content", ["", "[]", '{"version": 4}', '{"version": "x", "settings": {}}'])
def test_damaged_news_of_the_end_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "finished.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"finished\.json: damaged .* remove it to go on"):
        finished_before(tmp_path, {})
    (tmp_path / "finished.json").write_text('{"version": 4, "settings": {}}')
    assert finished_before(tmp_path, {})


def test_learner_on_a_disk_of_its_own_is_refused(checkpoints):
    class Elsewhere(FileLearner):
        async def save_checkpoint(self, folder, client_state):
            pass

    with pytest.raises(CheckpointError, match="a folder that all machines share"):
        save(checkpoints, make_state(4), Elsewhere())
    assert checkpoints.newest_version() is None


KILLED_WRITER = """
import asyncio, os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from sif_ray import checkpoints as module
from test_checkpoint import Checkpoints, FileLearner, make_state
flushed = []
def flush(path, really=module._flush):
    if len(flushed) == {kill_at}:
        os.kill(os.getpid(), signal.SIGKILL)
    flushed.append(path)
    really(path)
module._flush = flush
checkpoints = Checkpoints(Path({folder!r}), {{"group_size": 2}}, keep=2)
asyncio.run(checkpoints.save(make_state(8), FileLearner()))
"""


@pytest.mark.parametrize("kill_at", [0, 3])
def test_writer_killed_before_the_rename_leaves_nothing_that_counts(checkpoints, tmp_path, kill_at):
    save(checkpoints, make_state(4))
    folder = str(tmp_path / "checkpoints")
    program = KILLED_WRITER.format(tests=str(Path(__file__).parent), folder=folder, kill_at=kill_at)
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert checkpoints.newest_version() == 4


# --- damage ----------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 3)


def change_a_number(path: Path) -> None:
    text = path.read_text()
    assert text.count('"epoch": 0') == 1
    path.write_text(text.replace('"epoch": 0', '"epoch": 1'))


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("state.json", truncate),
        ("state.json", flip_a_byte),
        ("state.json", change_a_number),
        ("state.json", lambda path: path.write_text("[]")),
        ("state.json", Path.unlink),
        ("groups.parquet", truncate),
        ("groups.parquet", flip_a_byte),
        ("groups.parquet", Path.unlink),
        ("learner/step/rank0.pt", truncate),
        ("learner/step/rank0.pt", Path.unlink),
    ],
)
def test_damage_is_an_error_that_names_the_file_and_the_way_out(checkpoints, tmp_path, file, damage: Callable):
    save(checkpoints, make_state(4))
    save(checkpoints, make_state(8))
    folder = tmp_path / "checkpoints" / "step-000008"
    damage(folder / file)
    assert issubclass(CheckpointError, ConfigError)
    for check in (checkpoints.check_newest, lambda: load(checkpoints, 8)):
        with pytest.raises(CheckpointError) as refused:
            check()
        assert str(folder / file) in str(refused.value)
        assert f"remove the folder {folder} " in str(refused.value) and "resume=false" in str(refused.value)
    assert load(checkpoints, 4).version == 4


def test_groups_of_another_state_are_refused(checkpoints, tmp_path):
    state = make_state()
    save(checkpoints, replace(state, groups={"0/p0": state.groups["0/p0"]}))
    with pytest.raises(CheckpointError, match=r"groups.parquet: damaged \(its groups are not those"):
        load(checkpoints, 0)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.fixture
def policy(tmp_path) -> str:
    folder = tmp_path / "policy"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return str(folder)


def sample(name: str, answer: str = "red", image: bytes = b"rgb") -> Sample:
    return Sample(name, name, "toy", "grpo", "What?", "", answer, (), 8, 8, image, b"depth", "exact", "image")


def settings_of(policy: str, samples: list[Sample] | None = None, **changes) -> dict:
    return run_settings(GrpoConfig(policy=policy, **changes), samples or [sample("a"), sample("b")])


def refusal(tmp_path: Path, before: dict, after: dict) -> str:
    folder = tmp_path / "checkpoints"
    save(Checkpoints(folder, before, keep=1), make_state())
    with pytest.raises(CheckpointError) as refused:
        Checkpoints(folder, after, keep=1).check_newest()
    return str(refused.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"group_size": 4}, "group_size = 4, was 8"),
        ({"seed": 1}, "seed = 1, was 0"),
        ({"max_staleness": 0}, "max_staleness = 0, was 2"),
        ({"learner": LearnerConfig(zero_stage=3)}, "learner.zero_stage = 3, was 2"),
        ({"learner": LearnerConfig(deepspeed={"a": {"b": 1}})}, "learner.deepspeed.a.b = 1, was None"),
        ({"judge": JudgeConfig(kind="llm", model="m", base_url="http://judge")}, "judge.kind = 'llm', was 'exact'"),
    ],
)
def test_other_settings_are_refused_with_their_names(tmp_path, policy, changes, told):
    message = refusal(tmp_path, settings_of(policy), settings_of(policy, **changes))
    assert told in message and "resume=false" in message and "another output" in message


def test_another_policy_or_dataset_at_the_same_path_is_refused(tmp_path, policy):
    before = settings_of(policy)
    assert "contents of data" in refusal(tmp_path, before, settings_of(policy, [sample("a"), sample("b", "blue")]))
    other_image = [sample("a"), sample("b", image=b"rgb, too")]
    assert "contents of data" in refusal(tmp_path, before, settings_of(policy, other_image))
    flip_a_byte(Path(policy) / "model.safetensors")
    assert "contents of policy" in refusal(tmp_path, before, settings_of(policy))


def test_how_a_run_is_carried_out_may_change(tmp_path, policy):
    moved = tmp_path / "moved"
    Path(policy).rename(moved)
    moved.rename(policy)
    changed = {
        "output": "elsewhere",
        "num_engines": 3,
        "lease_timeout_s": 5.0,
        "checkpoint_every": 1,
        "engine": EngineConfig(max_num_seqs=7),
        "learner": LearnerConfig(threads=2),
    }
    save(Checkpoints(tmp_path / "checkpoints", settings_of(policy), keep=1), make_state())
    Checkpoints(tmp_path / "checkpoints", settings_of(policy, **changed), keep=1).check_newest()


def test_the_list_of_what_may_change_names_keys_that_exist():
    for name in MAY_CHANGE:
        block = GrpoConfig()
        for part in name.split("."):
            block = getattr(block, part)
