"""Toy scenes: a few coloured solids over a plain, placed so that depth cannot be read from size or height alone.

Camera frame in metres: x right, y down, z forward; the camera sits at the origin and looks along +z. Image frame in
pixels: u right, v down, `u = FOCAL_PX * x / z + SIZE_PX / 2`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

SIZE_PX = 112
FOCAL_PX = 120.0
CAMERA_HEIGHT_M = 2.4
NEAR_M, FAR_M = 3.2, 10.0  # of object centres
SKY_M = 14.0  # depth given to the sky
SHAPES = ("ball", "box", "cone")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")

_RADIUS_PX = (9.0, 19.0)  # apparent half-size, drawn independently of depth
_FLOATING_SHARE = 0.75
_MIN_GAP_PX = 2.0
_HORIZON_PX = SIZE_PX / 2
_LOWEST_PX = _HORIZON_PX + FOCAL_PX * CAMERA_HEIGHT_M / FAR_M  # the plain at FAR_M: the lowest foot of a floating solid


@dataclass(frozen=True)
class Solid:
    """One object: a ball of radius r, a box of half-side 0.85 r, or an upright cone of base radius r and height 2 r."""

    shape: str
    colour: str
    x_m: float
    y_m: float
    z_m: float
    radius_m: float
    yaw_rad: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def u_px(self) -> float:
        return FOCAL_PX * self.x_m / self.z_m + SIZE_PX / 2

    @property
    def v_px(self) -> float:
        return FOCAL_PX * self.y_m / self.z_m + SIZE_PX / 2

    @property
    def radius_px(self) -> float:
        return FOCAL_PX * self.radius_m / self.z_m


@dataclass(frozen=True)
class Scene:
    """Solids of distinct colours, so that a name such as "red ball" is unique. Equal seeds give equal scenes."""

    seed: int
    solids: tuple[Solid, ...]
    counted_shape: str  # the shape whose count (1, 2 or 3) was drawn flat


def make_scene(seed: int) -> Scene:
    """Draw 2 to 4 solids that do not overlap in the image.

    One shape is drawn first with its count (1, 2 or 3 alike), so that "how many" has a flat prior. Apparent size,
    height in the image and depth are independent for the floating three quarters of the solids; the rest stands on
    the plain.
    """
    rng = np.random.default_rng([seed, 0x51F])
    counted = int(rng.integers(1, 4))
    total = int(rng.integers(max(2, counted), 5))
    first, *others = rng.permutation(SHAPES)
    shapes = [str(first)] * counted + [str(rng.choice(others)) for _ in range(total - counted)]
    colours = rng.permutation(COLOURS)[:total]
    while True:
        placed: list[Solid] = []
        for shape, colour in zip(shapes, colours, strict=True):
            solid = _place(rng, shape, str(colour), placed)
            if solid is None:
                break
            placed.append(solid)
        else:
            return Scene(seed, tuple(placed[i] for i in rng.permutation(total)), shapes[0])


def _place(rng: np.random.Generator, shape: str, colour: str, placed: list[Solid]) -> Solid | None:
    for _ in range(30):
        solid = _draw(rng, shape, colour)
        if all(_apart(solid, other) for other in placed):
            return solid
    return None


def _draw(rng: np.random.Generator, shape: str, colour: str) -> Solid:
    radius_px = rng.uniform(*_RADIUS_PX)
    if rng.random() < _FLOATING_SHARE:
        z = math.exp(rng.uniform(math.log(NEAR_M), math.log(FAR_M)))
        v = rng.uniform(radius_px + 1, _LOWEST_PX - radius_px)
    else:
        v = rng.uniform(_LOWEST_PX, SIZE_PX - 2) - radius_px
        z = FOCAL_PX * CAMERA_HEIGHT_M / (v + radius_px - _HORIZON_PX)
    u = rng.uniform(radius_px + 1, SIZE_PX - radius_px - 1)
    scale = z / FOCAL_PX
    centre = SIZE_PX / 2
    return Solid(
        shape, colour, (u - centre) * scale, (v - centre) * scale, z, radius_px * scale, rng.uniform(0, math.pi / 2)
    )


def _apart(a: Solid, b: Solid) -> bool:
    reach = 1.1 * (a.radius_px + b.radius_px) + _MIN_GAP_PX
    return (
        max(abs(a.u_px - b.u_px), abs(a.v_px - b.v_px)) > reach
        or math.hypot(a.u_px - b.u_px, a.v_px - b.v_px) > 1.15 * reach
    )
