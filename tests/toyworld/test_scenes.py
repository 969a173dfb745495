"""The renderer against an independent sphere tracer, and scenes whose depth cannot be guessed from size or height."""

from __future__ import annotations

import numpy as np
import pytest

from sif_ray.toyworld.questions import CHANCE, QUESTION_TYPES, all_questions, draw_questions
from sif_ray.toyworld.render import render
from sif_ray.toyworld.scenes import CAMERA_HEIGHT_M, FOCAL_PX, SIZE_PX, SKY_M, Solid, make_scene


def signed_distance(solid: Solid, point: np.ndarray) -> float:
    """Distance in metres to the surface of a solid, from its definition and not from any ray formula (a bound for the
    cone)."""
    x, y, z = point - [solid.x_m, solid.y_m, solid.z_m]
    r = solid.radius_m
    if solid.shape == "ball":
        return float(np.linalg.norm([x, y, z]) - r)
    if solid.shape == "box":
        cos, sin = np.cos(solid.yaw_rad), np.sin(solid.yaw_rad)
        local = np.array([cos * x + sin * z, y, -sin * x + cos * z])
        outside = np.abs(local) - 0.85 * r
        return float(np.linalg.norm(np.maximum(outside, 0)) + min(outside.max(), 0))
    flank = (np.hypot(x, z) - 0.5 * (y + r)) * np.cos(np.arctan(0.5))
    return float(max(flank, y - r))


def march(scene, u: int, v: int) -> tuple[float, int]:
    """z-depth and solid index under a pixel by sphere tracing."""
    ray = np.array([(u + 0.5 - SIZE_PX / 2) / FOCAL_PX, (v + 0.5 - SIZE_PX / 2) / FOCAL_PX, 1.0])
    length = np.linalg.norm(ray)
    z = 0.5
    while z < SKY_M:
        point = ray * z
        distances = [signed_distance(solid, point) for solid in scene.solids]
        if min(distances) < 1e-4:
            return z, int(np.argmin(distances))
        if point[1] > CAMERA_HEIGHT_M:
            return CAMERA_HEIGHT_M / ray[1], -1
        to_plain = (CAMERA_HEIGHT_M - point[1]) / ray[1] if ray[1] > 0 else SKY_M
        z += max(min(min(distances) / length * 0.9, to_plain), 2e-4)
    return SKY_M, -1


@pytest.mark.parametrize("seed", [0, 3, 4, 11])
def test_depth_and_solids_agree_with_sphere_tracing(seed):
    scene = make_scene(seed)
    rendering = render(scene)
    rng = np.random.default_rng(seed)
    edges = 0
    for u, v in rng.integers(0, SIZE_PX, (150, 2)):
        z, index = march(scene, u, v)
        if index != rendering.solid_index[v, u]:
            edges += 1  # a silhouette pixel may fall either way
            continue
        assert rendering.z_m[v, u] == pytest.approx(z, abs=0.02)
    assert edges <= 3


@pytest.mark.parametrize("seed", range(20))
def test_boxes_hold_exactly_the_visible_pixels(seed):
    scene = make_scene(seed)
    rendering = render(scene)
    for index in range(len(scene.solids)):
        x1, y1, x2, y2 = (round(value * SIZE_PX) for value in rendering.box(index))
        inside = rendering.solid_index == index
        assert inside[y1:y2, x1:x2].sum() == inside.sum() > 100
        for edge in (inside[y1, x1:x2], inside[y2 - 1, x1:x2], inside[y1:y2, x1], inside[y1:y2, x2 - 1]):
            assert edge.any()


def test_a_solid_that_is_not_there_has_no_box():
    with pytest.raises(ValueError, match="solid 9 is not visible"):
        render(make_scene(0)).box(9)


def test_scenes_repeat_with_the_seed_and_differ_between_seeds():
    assert make_scene(5) == make_scene(5)
    assert make_scene(5) != make_scene(6)
    np.testing.assert_array_equal(render(make_scene(5)).rgb, render(make_scene(5)).rgb)


def test_answers_are_true():
    for seed in range(300):
        scene = make_scene(seed)
        by_name = {solid.name: solid for solid in scene.solids}
        assert len(by_name) == len(scene.solids)
        for kind, questions in all_questions(scene).items():
            for question in questions:
                evidence = [scene.solids[index] for index in question.evidence]
                if kind == "closer":
                    assert question.answer == min(evidence, key=lambda solid: solid.z_m).name
                elif kind == "side":
                    first, second = evidence
                    assert question.answer == ("left" if first.x_m / first.z_m < second.x_m / second.z_m else "right")
                elif kind == "count":
                    assert question.answer == str(sum(s.shape == scene.counted_shape for s in scene.solids))
                else:
                    side, anchor = ("left", -1) if " left of " in question.text else ("right", 1), None
                    anchor = next(s for s in scene.solids if question.text.endswith(f"the {s.name}?"))
                    there = [s for s in scene.solids if s is not anchor and (s.u_px - anchor.u_px) * side[1] > 0]
                    assert [getattr(s, kind) for s in there] == [question.answer]


def test_answers_are_balanced_and_closeness_cannot_be_guessed():
    counts = {kind: {} for kind in QUESTION_TYPES}
    lower, bigger = [], []
    for seed in range(3000):
        scene = make_scene(seed)
        for question in draw_questions(scene, 2):
            counts[question.question_type].setdefault(question.answer, []).append(seed)
            if question.question_type == "closer":
                a, b = (scene.solids[index] for index in question.evidence)
                first = question.answer == a.name
                lower.append((a.v_px + a.radius_px > b.v_px + b.radius_px) == first)
                bigger.append((a.radius_px > b.radius_px) == first)
    for kind in ("side", "count", "colour", "shape"):
        sizes = [len(seeds) for seeds in counts[kind].values()]
        assert max(sizes) / sum(sizes) < CHANCE[kind] + 0.08, kind
    assert 0.38 < np.mean(lower) < 0.62
    assert 0.42 < np.mean(bigger) < 0.58
