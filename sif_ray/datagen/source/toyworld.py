"""Rendered scenes with questions whose answers and evidence are true by construction."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from sif_ray.datagen.annotations import Annotation, Picture
from sif_ray.method.boxes import Box
from sif_ray.toyworld.questions import draw_questions
from sif_ray.toyworld.render import png, render
from sif_ray.toyworld.scenes import SIZE_PX, make_scene

_SCENES_PER_SPLIT = 2**32
_SCENES_KEPT = 8  # rows of one scene are neighbours


@dataclass(frozen=True)
class ToyworldSource:
    """Rendered scenes. A scene follows from the seed, the name of its split and its place in the split alone.

    Evidence is what the camera sees: an annotation has its boxes and their names once its picture is open.
    """

    scenes_per_split: dict[str, int]
    questions_per_scene: int
    seed: int

    def annotations(self) -> Iterator[Annotation]:
        for split, scenes in self.scenes_per_split.items():
            for place in range(scenes):
                yield from self._scene_annotations(split, place)

    def open(self, annotation: Annotation) -> Picture:
        place = int(annotation.image.rsplit("-", 1)[1])
        image, evidence = _rendered(self.scene_seed(annotation.split, place), self.questions_per_scene)
        boxes, names = evidence[annotation.question_type]
        return Picture(replace(annotation, boxes=boxes, names=names), image)

    def scene_seed(self, split: str, place: int) -> int:
        """Different for every split; far above the seeds that the recipes of the tiny models train on."""
        digest = hashlib.blake2b(f"{self.seed}/{split}".encode(), digest_size=8).digest()
        return (2**64 + int.from_bytes(digest)) * _SCENES_PER_SPLIT + place

    def _scene_annotations(self, split: str, place: int) -> Iterator[Annotation]:
        name = f"toy-{self.seed}-{split}-{place:06d}"
        for question in draw_questions(make_scene(self.scene_seed(split, place)), self.questions_per_scene):
            yield Annotation(
                sample_id=f"{name}-{question.question_type}",
                dataset="toyworld",
                split=split,
                image=name,
                question=question.text,
                question_type=question.question_type,
                answer=question.answer,
                boxes=(),
                frame="image",
                width=SIZE_PX,
                height=SIZE_PX,
            )


@lru_cache(maxsize=_SCENES_KEPT)
def _rendered(scene_seed: int, num_questions: int) -> tuple[bytes, dict[str, tuple[tuple[Box, ...], tuple[str, ...]]]]:
    """The PNG of a scene and, by type of question, the boxes of the evidence from left to right with their names."""
    scene = make_scene(scene_seed)
    rendering = render(scene)
    evidence = {}
    for question in draw_questions(scene, num_questions):
        seen = sorted((rendering.box(index), scene.solids[index]) for index in question.evidence)
        is_count = question.question_type == "count"
        names = tuple(solid.shape if is_count else solid.name for _, solid in seen)
        evidence[question.question_type] = (tuple(box for box, _ in seen), names)
    return png(rendering.rgb), evidence
