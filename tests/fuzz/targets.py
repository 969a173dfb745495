"""What takes bytes from outside, each with what may come of any bytes: a value that keeps its promises, or a refusal.

A target gets any bytes and says whether they were read, not refused. Whatever it raises is a finding.
"""

from __future__ import annotations

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


def trace(data: bytes) -> bool:
    text = data.decode("utf-8", "replace")
    growing = GrowingTrace()
    for start in range(0, len(text), PIECE):
        growing.feed(text[start : start + PIECE])
    find_answer(text)
    assert all(len(box.bbox_2d) == 4 for area in find_areas(text) for box in area)
    read = False
    for profile in ("corrected", "published"):
        try:
            found = parse(text, profile)
        except TraceError as error:
            assert error.reasons
            continue
        read = True
        assert (list(found.steps), found.answer) == (growing.steps, growing.answer)
        if profile == "corrected":  # the other one allows areas outside of the thinking
            assert find_areas(text, strict=True) == [list(step.boxes) for step in found.steps]
    return read


def judge_reply(data: bytes) -> bool:
    try:
        assert 0 <= read_score(data.decode("utf-8", "replace")) <= 1
    except ValueError:
        return False
    return True


def exact_answer(data: bytes) -> bool:
    question, answer, prediction = (data.decode("utf-8", "replace") + "\n\n").split("\n", 2)
    return ExactMatchJudge().same(question, answer, prediction)


def configuration_file(data: bytes) -> bool:
    path = FOLDER / "config.yaml"
    path.write_bytes(data)
    return _accepts(ConfigError, lambda: configuration.load("grpo", str(path)))


def annotation_file(data: bytes) -> bool:
    """The first byte chooses the format."""
    formats = sorted([*FORMATS, "coco"])
    chosen = formats[data[0] % len(formats)] if data else formats[0]
    path = FOLDER / "annotations.json"
    path.write_bytes(data[1:])
    source = FileSource(chosen, (str(path),), PictureFolder(str(FOLDER)), "corrected")

    def read() -> None:
        rows = [annotation_to_row(annotation) for annotation in source.annotations()]
        pa.Table.from_pylist(rows, ANNOTATION_SCHEMA)

    return _accepts(ConfigError, read)


def manifest(data: bytes) -> bool:
    folder = FOLDER / "dataset"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_bytes(data)
    return _accepts(ConfigError, lambda: read_manifest(str(folder)))


def checkpoint_state(data: bytes) -> bool:
    checkpoints = CheckpointFolder(FOLDER / "checkpoints", {"seed": 1}, keep=1)
    if checkpoints.newest() is None:
        checkpoints.begin(3)
        checkpoints.complete(3, {"ledger": {}})
    (checkpoints.path(3) / "state.json").write_bytes(data)
    return _accepts(CheckpointError, lambda: checkpoints.read(3))


def photograph(data: bytes) -> bool:
    def read() -> None:
        photo = read_photo(data, 10_000_000, MAX_PIXELS)
        assert photo.rgb.width * photo.rgb.height <= MAX_PIXELS

    return _accepts(RequestRefused, read)


def depth_file(data: bytes) -> bool:
    return _accepts(PhotoError, lambda: colour_depth(data))


def chat_body(data: bytes) -> bool:
    return _accepts(ValidationError, lambda: ChatRequest.model_validate_json(data))


def sif_body(data: bytes) -> bool:
    return _accepts(
        (ValidationError, RequestRefused), lambda: decode_base64(SifRequest.model_validate_json(data).image)
    )


def _accepts(refusal: type[Exception] | tuple[type[Exception], ...], read: Callable[[], object]) -> bool:
    try:
        read()
    except refusal as error:
        assert str(error)
        return False
    return True


TARGETS: dict[str, Callable[[bytes], bool]] = {
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
