"""Ray casting of toy scenes: colour, exact z-depth and an object mask per pixel, a few milliseconds a scene.

Cues that a monocular depth model can read: haze that grows with distance, shadows straight below floating solids, and
the point where a standing solid meets the plain.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from sif_ray.method.boxes import Box
from sif_ray.toyworld.scenes import CAMERA_HEIGHT_M, FOCAL_PX, NEAR_M, SIZE_PX, SKY_M, Scene, Solid

Array = npt.NDArray[np.float64]

PALETTE = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (244, 206, 28),
    "purple": (150, 60, 190),
    "orange": (245, 130, 25),
}
_HAZE = np.array([206.0, 216.0, 226.0])
_HAZE_LENGTH_M = 7.0
_PLAIN = np.array([[120.0, 116.0, 104.0], [134.0, 130.0, 118.0]])
_LIGHT = np.array([-0.45, -0.75, -0.48]) / np.linalg.norm([-0.45, -0.75, -0.48])  # towards the light
_BOX_HALF = 0.85

_pixel = (np.arange(SIZE_PX) + 0.5 - SIZE_PX / 2) / FOCAL_PX
_RAY_X, _RAY_Y = np.meshgrid(_pixel, _pixel)  # ray (x, y, 1): its parameter is z-depth


@dataclass(frozen=True)
class Rendering:
    """What the camera sees. `solid_index` is -1 where no solid is visible."""

    rgb: npt.NDArray[np.uint8]  # (H, W, 3)
    z_m: npt.NDArray[np.float32]  # (H, W), exact z-depth; the sky at SKY_M
    solid_index: npt.NDArray[np.int8]  # (H, W)

    @property
    def disparity(self) -> npt.NDArray[np.float32]:
        """1 / z in 1/m: what Depth Anything predicts up to scale and shift."""
        return np.float32(1.0) / self.z_m

    def box(self, index: int) -> Box:
        """bbox_xyxy_norm around the visible pixels of a solid. Raises ValueError where none is visible."""
        rows, columns = np.nonzero(self.solid_index == index)
        if rows.size == 0:
            raise ValueError(f"solid {index} is not visible")
        height, width = self.solid_index.shape
        return (
            float(columns.min() / width),
            float(rows.min() / height),
            float((columns.max() + 1) / width),
            float((rows.max() + 1) / height),
        )


def render(scene: Scene, haze_z_m: Sequence[float] | None = None) -> Rendering:
    """Cast one ray through every pixel centre.

    `haze_z_m` gives each solid the haze of another depth than its own: a scene whose colours say nothing about depth.
    """
    z = np.full((SIZE_PX, SIZE_PX), SKY_M)
    colour = np.empty((SIZE_PX, SIZE_PX, 3))
    colour[:] = _HAZE - 18.0 * np.clip(-_RAY_Y, 0, 1)[..., None] * np.array([2.2, 1.2, 0.2])
    index = np.full((SIZE_PX, SIZE_PX), -1, np.int8)
    _draw_plain(scene, z, colour)
    for number, solid in enumerate(scene.solids):
        _draw_solid(solid, number, z, colour, index)
    air = z.copy()
    for number, depth in enumerate(haze_z_m or ()):
        air[index == number] = depth
    haze = 1 - np.exp(-np.clip(air - NEAR_M, 0, None) / _HAZE_LENGTH_M)
    haze[z >= SKY_M] = 0  # the sky has its colour already
    rgb = colour + haze[..., None] * (_HAZE - colour)
    return Rendering(np.clip(rgb + 0.5, 0, 255).astype(np.uint8), z.astype(np.float32), index)


def png(rgb: npt.NDArray[np.uint8]) -> bytes:
    """An (H, W, 3) image as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG")
    return buffer.getvalue()


def _draw_plain(scene: Scene, z: Array, colour: Array) -> None:
    below = _RAY_Y * SKY_M > CAMERA_HEIGHT_M
    depth = CAMERA_HEIGHT_M / _RAY_Y[below]
    x = _RAY_X[below] * depth
    tiles = (np.floor(x / 1.5) + np.floor(depth / 1.5)).astype(int) % 2
    shade = np.ones_like(depth)
    for solid in scene.solids:
        reach = np.hypot(x - solid.x_m, depth - solid.z_m) / solid.radius_m
        shade *= 1 - 0.55 * np.clip(1.25 - reach, 0, 0.5) / 0.5
    z[below] = depth
    colour[below] = _PLAIN[tiles] * shade[:, None]


def _draw_solid(solid: Solid, number: int, z: Array, colour: Array, index: npt.NDArray[np.int8]) -> None:
    reach = 1.6 * solid.radius_px + 2
    rows = slice(max(0, int(solid.v_px - reach)), min(SIZE_PX, int(solid.v_px + reach) + 1))
    columns = slice(max(0, int(solid.u_px - reach)), min(SIZE_PX, int(solid.u_px + reach) + 1))
    dx, dy = _RAY_X[rows, columns], _RAY_Y[rows, columns]
    depth, normal = _CAST[solid.shape](solid, dx, dy)
    hit = depth < z[rows, columns]
    light = 0.42 + 0.58 * np.clip(normal @ _LIGHT, 0, 1)
    z[rows, columns][hit] = depth[hit]
    index[rows, columns][hit] = number
    colour[rows, columns][hit] = np.array(PALETTE[solid.colour]) * light[hit][:, None]


def _cast_ball(solid: Solid, dx: Array, dy: Array) -> tuple[Array, Array]:
    cx, cy, cz, r = solid.x_m, solid.y_m, solid.z_m, solid.radius_m
    a = dx * dx + dy * dy + 1
    b = dx * cx + dy * cy + cz
    discriminant = b * b - a * (cx * cx + cy * cy + cz * cz - r * r)
    depth = np.where(discriminant > 0, (b - np.sqrt(np.maximum(discriminant, 0))) / a, np.inf)
    t = np.where(np.isfinite(depth), depth, 0)
    return depth, np.stack([(dx * t - cx) / r, (dy * t - cy) / r, (t - cz) / r], -1)


def _cast_box(solid: Solid, dx: Array, dy: Array) -> tuple[Array, Array]:
    half = _BOX_HALF * solid.radius_m
    cos, sin = np.cos(solid.yaw_rad), np.sin(solid.yaw_rad)
    origin = np.array([-cos * solid.x_m - sin * solid.z_m, -solid.y_m, sin * solid.x_m - cos * solid.z_m])
    ray = np.stack([cos * dx + sin, dy, -sin * dx + cos], -1)  # in the frame of the box
    inverse = 1 / np.where(np.abs(ray) < 1e-9, 1e-9, ray)
    low, high = (-half - origin) * inverse, (half - origin) * inverse
    enter, leave = np.minimum(low, high), np.maximum(low, high)
    face = enter.argmax(-1)
    depth = np.where(enter.max(-1) < leave.min(-1), enter.max(-1), np.inf)
    local = -np.sign(np.take_along_axis(ray, face[..., None], -1)) * (np.arange(3) == face[..., None])
    x, y, z = local[..., 0], local[..., 1], local[..., 2]
    return depth, np.stack([cos * x - sin * z, y, sin * x + cos * z], -1)


def _cast_cone(solid: Solid, dx: Array, dy: Array) -> tuple[Array, Array]:
    cx, cz, r = solid.x_m, solid.z_m, solid.radius_m
    apex, base, slope = solid.y_m - r, solid.y_m + r, 0.5  # radius = slope * (y - apex)
    a = dx * dx + 1 - (slope * dy) ** 2
    b = dx * cx + cz - slope**2 * dy * apex
    discriminant = b * b - a * (cx * cx + cz * cz - (slope * apex) ** 2)
    side = (b - np.sqrt(np.maximum(discriminant, 0))) / a
    y = side * dy
    side = np.where((discriminant > 0) & (y > apex) & (y < base), side, np.inf)
    disc = base / np.where(np.abs(dy) < 1e-9, 1e-9, dy)
    inside = (disc > 0) & (np.hypot(dx * disc - cx, disc - cz) < r)
    disc = np.where(inside, disc, np.inf)
    depth = np.minimum(side, disc)
    t = np.where(np.isfinite(side), side, 0)
    flank = np.stack([dx * t - cx, -(slope**2) * (dy * t - apex), t - cz], -1)
    flank /= np.linalg.norm(flank, axis=-1, keepdims=True) + 1e-12
    return depth, np.where((disc < side)[..., None], np.array([0.0, 1.0, 0.0]), flank)


_CAST = {"ball": _cast_ball, "box": _cast_box, "cone": _cast_cone}
