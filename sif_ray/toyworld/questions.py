"""Questions about a toy scene with their answers and evidence, true by construction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sif_ray.method.boxes import Box
from sif_ray.toyworld.render import Rendering
from sif_ray.toyworld.scenes import COLOURS, SHAPES, Scene

QUESTION_TYPES = ("closer", "side", "count", "colour", "shape")
CHANCE = {"closer": 1 / 2, "side": 1 / 2, "count": 1 / 3, "colour": 1 / len(COLOURS), "shape": 1 / len(SHAPES)}
"""Accuracy of a guess from the question alone."""

PLURAL = {"ball": "balls", "box": "boxes", "cone": "cones"}
_MIN_DEPTH_RATIO = 1.2  # between two solids that a question compares in depth
_MIN_OFFSET_PX = 8.0  # between two solids that a question compares from left to right


@dataclass(frozen=True)
class Question:
    """A question with its answer; `evidence` are indices into `scene.solids`."""

    question_type: str
    text: str
    answer: str
    evidence: tuple[int, ...]

    def boxes(self, rendering: Rendering) -> tuple[Box, ...]:
        """The evidence as bbox_xyxy_norm, from left to right."""
        return tuple(sorted(rendering.box(index) for index in self.evidence))


def all_questions(scene: Scene) -> dict[str, list[Question]]:
    """Every question that the scene can answer, by type; a type that it cannot answer has an empty list."""
    return {
        "closer": _closer(scene),
        "side": _side(scene),
        "count": _count(scene),
        "colour": _related(scene, "colour"),
        "shape": _related(scene, "shape"),
    }


def draw_questions(scene: Scene, number: int) -> list[Question]:
    """`number` questions of different types (fewer if the scene answers fewer types), drawn by the scene's seed.

    Of the count questions only the one about the shape whose count was drawn flat is asked, so that 1, 2 and 3 are
    equally likely.
    """
    rng = np.random.default_rng([scene.seed, 0xA5C])
    offers = all_questions(scene)
    types = [kind for kind in rng.permutation(QUESTION_TYPES) if offers[kind]]
    return [offers[kind][rng.integers(len(offers[kind]))] for kind in types[:number]]


def _pairs(scene: Scene) -> list[tuple[int, int]]:
    numbers = range(len(scene.solids))
    return [(i, j) for i in numbers for j in numbers if i != j]


def _closer(scene: Scene) -> list[Question]:
    found = []
    for i, j in _pairs(scene):
        a, b = scene.solids[i], scene.solids[j]
        if max(a.z_m, b.z_m) / min(a.z_m, b.z_m) >= _MIN_DEPTH_RATIO:
            answer = a.name if a.z_m < b.z_m else b.name
            found.append(Question("closer", f"Which is closer, the {a.name} or the {b.name}?", answer, (i, j)))
    return found


def _side(scene: Scene) -> list[Question]:
    found = []
    for i, j in _pairs(scene):
        a, b = scene.solids[i], scene.solids[j]
        if abs(a.u_px - b.u_px) >= _MIN_OFFSET_PX:
            answer = "left" if a.u_px < b.u_px else "right"
            found.append(Question("side", f"Is the {a.name} left or right of the {b.name}?", answer, (i, j)))
    return found


def _count(scene: Scene) -> list[Question]:
    shapes = [solid.shape for solid in scene.solids]
    counted = scene.counted_shape
    evidence = tuple(i for i, shape in enumerate(shapes) if shape == counted)
    return [Question("count", f"How many {PLURAL[counted]} are there?", str(len(evidence)), evidence)]


def _related(scene: Scene, attribute: str) -> list[Question]:
    found = []
    for i, anchor in enumerate(scene.solids):
        for side, sign in (("left", -1), ("right", 1)):
            offsets = [sign * (other.u_px - anchor.u_px) for other in scene.solids]
            there = [j for j, offset in enumerate(offsets) if j != i and offset > 0]
            if len(there) == 1 and offsets[there[0]] >= _MIN_OFFSET_PX:
                target = scene.solids[there[0]]
                text = f"What {attribute} is the object {side} of the {anchor.name}?"
                found.append(Question(attribute, text, getattr(target, attribute), (there[0],)))
    return found
