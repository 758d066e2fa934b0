"""Renderer of the embedded world, and the OKLab colour space in which its colours are told apart.

Scenes are painted back to front in sRGB: image <- image + coverage * (color - image). Coverage is the share of a pixel
inside the shape, by 4 x 4 supersampling of an inside test. The coverage of a shape depends only on its radius and on
where its centre lies within a pixel, so it is computed once as a small stamp and pasted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from dmdr_jax.shapes.world import BACKGROUND_PALETTE, PALETTE, Scene, World

SUPERSAMPLING = 4

_STAR_POINTS, _STAR_OUTER, _STAR_INNER = 5, 1.2, 0.5

# Ottosson (2020), "A perceptual color space for image processing": linear sRGB -> cone response -> OKLab.
_RGB_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ],
    np.float32,
)
_LMS_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ],
    np.float32,
)


def _inside_star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A five-pointed star, apex up: each of the ten edges is a half-plane within its own 36 degree wedge."""
    wedge = math.pi / _STAR_POINTS
    angle = np.arctan2(x, -y)  # 0 at the apex
    folded = np.abs((angle + wedge) % (2 * wedge) - wedge)
    radius = np.hypot(x, y)
    across, along = radius * np.sin(folded), radius * np.cos(folded)
    inner_x, inner_y = _STAR_INNER * math.sin(wedge), _STAR_INNER * math.cos(wedge)
    return inner_x * (_STAR_OUTER - along) >= across * (_STAR_OUTER - inner_y)


def inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points (x right, y down, in radii about the centre) lie inside the unit-radius `shape`; boolean."""
    if shape == "circle":
        return x * x + y * y <= 1
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) <= 0.886
    if shape == "triangle":
        return (y >= -1 + 1.8 * np.abs(x) / 1.04) & (y <= 0.8)
    if shape == "diamond":
        return np.abs(x) + np.abs(y) <= 1.2
    if shape == "cross":
        long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
        return (long <= 1.05) & (short <= 0.36)
    if shape == "star":
        return _inside_star(x, y)
    if shape == "ring":
        squared = x * x + y * y
        return (squared >= 0.55**2) & (squared <= 1.05**2)
    if shape == "heart":
        u, v = 1.15 * x, -1.15 * y + 0.15
        return (u * u + v * v - 1) ** 3 <= u * u * v**3
    raise ValueError(f"unknown shape {shape!r}")


@functools.lru_cache(maxsize=8192)
def coverage_stamp(shape: str, radius: float, offset_x: float, offset_y: float, half: int) -> np.ndarray:
    """Coverage of the pixels around an object.

    Args:
      shape, radius: the object; radius in pixels.
      offset_x, offset_y: its centre's position inside the central pixel, in [0, 1).
      half: pixels on each side of the central one.
    Returns:
      float32 [2 half + 1, 2 half + 1] in [0, 1], read-only.
    """
    side = 2 * half + 1
    points = (np.arange(side * SUPERSAMPLING) + 0.5) / SUPERSAMPLING - half
    x = (points[None, :] - offset_x) / radius
    y = (points[:, None] - offset_y) / radius
    hits = inside(shape, x, y).reshape(side, SUPERSAMPLING, side, SUPERSAMPLING)
    stamp = hits.mean(axis=(1, 3), dtype=np.float32)
    stamp.flags.writeable = False
    return stamp


def stamp_half(world: World) -> int:
    """Half width in pixels of a stamp that holds the world's largest object wherever its centre lies in a pixel."""
    return math.ceil(world.reach * max(world.radii))


def color_array(names: Sequence[str]) -> np.ndarray:
    """sRGB values in [0, 1] of colours or backgrounds by name; float32 [len(names), 3]."""
    return np.array([{**BACKGROUND_PALETTE, **PALETTE}[name] for name in names], np.float32).reshape(-1, 3) / 255


def render(world: World, scenes: Sequence[Scene]) -> np.ndarray:
    """Paint scenes; float32 sRGB [n, size, size, 3] in [0, 1]."""
    half, size, n = stamp_half(world), world.size, len(scenes)
    backgrounds = color_array(world.backgrounds)[[world.backgrounds.index(scene.background) for scene in scenes]]
    padded: np.ndarray = np.empty(
        (n, size + 2 * half, size + 2 * half, 3), np.float32
    )  # stamps may reach past the edge
    padded[:] = backgrounds.reshape(n, 1, 1, 3)
    colors = color_array(world.colors)
    for slot in range(max((len(scene.objects) for scene in scenes), default=0)):
        painted = [i for i, scene in enumerate(scenes) if len(scene.objects) > slot]
        objects = [scenes[i].objects[slot] for i in painted]
        color = colors[[world.colors.index(obj.color) for obj in objects]]
        _paste(padded, np.array(painted), objects, color, half)
    return np.ascontiguousarray(padded[:, half : half + size, half : half + size])


def _paste(padded: np.ndarray, index: np.ndarray, objects, color: np.ndarray, half: int) -> None:
    """Blend one object into each of the images `index` of the padded canvas, in place."""
    corner_x = np.array([math.floor(obj.x) for obj in objects])
    corner_y = np.array([math.floor(obj.y) for obj in objects])
    stamps = np.stack([coverage_stamp(o.shape, o.radius, o.x % 1, o.y % 1, half) for o in objects])[..., None]
    span = np.arange(2 * half + 1)
    where = (
        index[:, None, None],
        (corner_y[:, None] + span)[:, :, None],
        (corner_x[:, None] + span)[:, None, :],
    )
    patch = padded[where]
    padded[where] = patch + stamps * (color[:, None, None, :] - patch)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """sRGB in [0, 1] to OKLab (lightness in [0, 1], a, b); float32 [..., 3]. Values outside [0, 1] are clipped."""
    rgb = np.clip(np.asarray(rgb, np.float32), 0, 1)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _RGB_TO_LMS.T) @ _LMS_TO_LAB.T


def chroma(lab: np.ndarray) -> np.ndarray:
    """Distance from the gray axis of OKLab values [..., 3] -> [...]."""
    return np.hypot(lab[..., 1], lab[..., 2])
