"""What the tiny base policy is taught: a scene's objects, boxes, depths, counts and relations as plain text.

None of it is in the SIF format: that is the warm-up's lesson.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sif_ray.method.boxes import Box
from sif_ray.method.depth_code import box_mean
from sif_ray.method.expansion import forward_frames
from sif_ray.toyworld.questions import PLURAL, all_questions
from sif_ray.toyworld.render import Rendering
from sif_ray.toyworld.scenes import SIZE_PX, Scene

DepthMap = npt.NDArray[np.floating]
Text = tuple[str, str]
"""A question and its answer."""


def all_texts(scene: Scene, rendering: Rendering, depth_rel: DepthMap) -> list[Text]:
    """Every plain text about a scene; `depth_rel` (H, W) is the depth that the policy is shown."""
    boxes = [rendering.box(index) for index in range(len(scene.solids))]
    order = sorted(range(len(boxes)), key=lambda index: boxes[index])
    rng = np.random.default_rng([scene.seed, 0x200])
    texts: list[Text] = []
    for index, solid in enumerate(scene.solids):
        place = _box_text(boxes[index])
        depth = f"{box_mean(depth_rel, boxes[index]):.2f}"
        texts.append((f"Where is the {solid.name}?", place))
        texts.append((f"Where is the {solid.colour} object?", f"{place} {solid.name}"))
        texts.append((f"How deep is the {solid.name}?", f"{place} {depth}"))
        texts.append((f"What is at {place}?", solid.name))
    for shape, plural in PLURAL.items():
        found = [index for index in order if scene.solids[index].shape == shape]
        if found:
            texts.append((f"Where are the {plural}?", "; ".join(_box_text(boxes[index]) for index in found)))
    described = [
        f"{scene.solids[index].name} {_box_text(boxes[index])} {box_mean(depth_rel, boxes[index]):.2f}"
        for index in order
    ]
    texts.append(("List the objects.", "; ".join(described)))
    for questions in all_questions(scene).values():
        for question in questions:
            texts.append((question.text, question.answer))
            evidence = question.boxes(rendering)
            places = "; ".join(_box_text(box) for box in evidence)
            texts.append((f"Where to look: {question.text}", f"{places} {question.answer}"))
            texts.append((f"List, then answer: {question.text}", f"{'; '.join(described)}; {places} {question.answer}"))
            texts.append((f"Zoom in: {question.text}", f"{_zoom(evidence, depth_rel, rng)}; {question.answer}"))
    return texts


def draw_texts(
    scene: Scene, rendering: Rendering, depth_rel: DepthMap, number: int, rng: np.random.Generator
) -> list[Text]:
    """`number` different texts, every kind of question alike."""
    texts = all_texts(scene, rendering, depth_rel)
    kinds: dict[str, list[Text]] = {}
    for text in texts:
        kinds.setdefault(" ".join(text[0].split()[:3]), []).append(text)
    names = sorted(kinds)
    drawn: list[Text] = []
    while len(drawn) < min(number, len(texts)):
        left = kinds[names[rng.integers(len(names))]]
        if left:
            drawn.append(left.pop(int(rng.integers(len(left)))))
    return drawn


def _zoom(evidence: Sequence[Box], depth_rel: DepthMap, rng: np.random.Generator) -> str:
    """Boxes and depths on the way from the whole image to the evidence."""
    frames = forward_frames(evidence, SIZE_PX, SIZE_PX, rng)
    shown = [[f"{_box_text(box)} {box_mean(depth_rel, box):.2f}" for box in frame] for frame in frames]
    return "; ".join(" and ".join(boxes) for boxes in shown)


def _box_text(box: Box) -> str:
    return ",".join(f"{value:.2f}" for value in box)
