"""What takes bytes from outside, each with what may come of any bytes: a value that keeps its promises, or a refusal.

A target gets any bytes and returns nothing. Whatever it raises is a finding.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from pydantic import ValidationError

from sif_ray import config as configuration
from sif_ray.checkpoints import CheckpointError, CheckpointFolder
from sif_ray.config import ConfigError
from sif_ray.datagen.annotations import ANNOTATION_SCHEMA, annotation_to_row
from sif_ray.datagen.dataset import read_manifest
from sif_ray.datagen.pictures import PhotoError
from sif_ray.datagen.source.depth import colour_depth
from sif_ray.datagen.source.files import FORMATS, FileSource
from sif_ray.datagen.source.picture_folder import PictureFolder
from sif_ray.judge.exact import ExactMatchJudge
from sif_ray.judge.reply import read_score
from sif_ray.method.trace import TraceError, find_answer, find_areas, parse
from sif_ray.serve.growing_trace import GrowingTrace
from sif_ray.serve.images import decode_base64, read_photo
from sif_ray.serve.protocol import ChatRequest, SifRequest
from sif_ray.serve.refusal import RequestRefused

MAX_PIXELS = 1_000_000
PIECE = 7  # characters that a growing trace gets at a time
_folder = tempfile.TemporaryDirectory(prefix="sif_ray-fuzz-")
FOLDER = Path(_folder.name)


def trace(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    growing = GrowingTrace()
    for start in range(0, len(text), PIECE):
        growing.feed(text[start : start + PIECE])
    find_answer(text)
    assert all(len(box.bbox_2d) == 4 for area in find_areas(text) for box in area)
    for profile in ("corrected", "published"):
        try:
            found = parse(text, profile)
        except TraceError as error:
            assert error.reasons
        else:
            assert (list(found.steps), found.answer) == (growing.steps, growing.answer)
            if profile == "corrected":  # the other one allows areas outside of the thinking
                assert find_areas(text, strict=True) == [list(step.boxes) for step in found.steps]


def judge_reply(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert 0 <= read_score(data.decode("utf-8", "replace")) <= 1


def exact_answer(data: bytes) -> None:
    question, answer, prediction = (data.decode("utf-8", "replace") + "\n\n").split("\n", 2)
    same = ExactMatchJudge().same(question, answer, prediction)
    assert same in (True, False)


def configuration_file(data: bytes) -> None:
    path = FOLDER / "config.yaml"
    path.write_bytes(data)
    with contextlib.suppress(ConfigError):
        configuration.load("grpo", str(path))


def annotation_file(data: bytes) -> None:
    """The first byte chooses the format."""
    formats = sorted([*FORMATS, "coco"])
    chosen = formats[data[0] % len(formats)] if data else formats[0]
    path = FOLDER / "annotations.json"
    path.write_bytes(data[1:])
    with contextlib.suppress(ConfigError):
        for annotation in FileSource(chosen, (str(path),), PictureFolder(str(FOLDER)), "corrected").annotations():
            pa.Table.from_pylist([annotation_to_row(annotation)], ANNOTATION_SCHEMA)


def manifest(data: bytes) -> None:
    folder = FOLDER / "dataset"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_bytes(data)
    with contextlib.suppress(ConfigError):
        read_manifest(str(folder))


def checkpoint_state(data: bytes) -> None:
    checkpoints = CheckpointFolder(FOLDER / "checkpoints", {"seed": 1}, keep=1)
    if checkpoints.newest() is None:
        checkpoints.begin(3)
        checkpoints.complete(3, {"ledger": {}})
    (checkpoints.path(3) / "state.json").write_bytes(data)
    with contextlib.suppress(CheckpointError):
        checkpoints.read(3)


def photograph(data: bytes) -> None:
    with contextlib.suppress(RequestRefused):
        photo = read_photo(data, 10_000_000, MAX_PIXELS)
        assert photo.rgb.width * photo.rgb.height <= MAX_PIXELS


def depth_file(data: bytes) -> None:
    with contextlib.suppress(PhotoError):
        colour_depth(data)


def chat_body(data: bytes) -> None:
    with contextlib.suppress(ValidationError):
        ChatRequest.model_validate_json(data)


def sif_body(data: bytes) -> None:
    with contextlib.suppress(ValidationError, RequestRefused):
        decode_base64(SifRequest.model_validate_json(data).image)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__.replace("_", "-"): target
    for target in (
        trace,
        judge_reply,
        exact_answer,
        configuration_file,
        annotation_file,
        manifest,
        checkpoint_state,
        photograph,
        depth_file,
        chat_body,
        sif_body,
    )
}
