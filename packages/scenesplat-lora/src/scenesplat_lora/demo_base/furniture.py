"""Furniture of the generated rooms as surfaces sampled by points.

A piece stands on z = 0 with its centre at x = y = 0; its back is towards -y. Sizes are metres.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DENSITY = 150.0  # points per square metre

Floats = NDArray[np.float64]
Vector = Sequence[float] | Floats


@dataclass(frozen=True)
class Points:
    """Points of surfaces.

    Attributes:
        coord: f64 [N, 3], metres.
        normal: f64 [N, 3], unit length, outwards.
        tone: i64 [N], 0: the piece's first colour, 1: its second.
    """

    coord: Floats
    normal: Floats
    tone: NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """A piece of furniture and the sides (along x, along y) of the floor that it takes."""

    points: Points
    sides: tuple[float, float]


def joined(parts: Sequence[Points]) -> Points:
    """All points in one."""
    return Points(
        np.concatenate([part.coord for part in parts]),
        np.concatenate([part.normal for part in parts]),
        np.concatenate([part.tone for part in parts]),
    )


# -- surfaces --------------------------------------------------------------------------------------


def rectangle(
    rng: np.random.Generator, corner: Vector, u: Vector, v: Vector, tone: int = 0
) -> Points:
    """Uniform points corner + a u + b v with a, b in 0..1; the normal is along u x v."""
    across = np.cross(u, v)
    area = float(np.linalg.norm(across))
    count = _count(rng, area)
    a, b = rng.random((2, count, 1))
    coord = np.asarray(corner) + a * np.asarray(u) + b * np.asarray(v)
    return Points(coord, np.tile(across / area, (count, 1)), np.full(count, tone))


def box(
    rng: np.random.Generator, low: Vector, high: Vector, tone: int = 0, bottom: bool = True
) -> Points:
    """The faces of an axis-aligned box; without `bottom` it has none, as on the floor."""
    low, high = np.asarray(low, float), np.asarray(high, float)
    x, y, z = np.diag(high - low)
    faces = [(low, z, y), (low, x, z), (high, -x, -y), (high, -y, -z), (high, -z, -x)]
    faces += [(low, y, x)] if bottom else []
    return joined([rectangle(rng, *face, tone) for face in faces])


def tube(rng: np.random.Generator, radius: float, low: float, high: float, tone: int = 0) -> Points:
    """The side of an upright cylinder around x = y = 0."""
    count = _count(rng, 2 * math.pi * radius * (high - low))
    angle = rng.uniform(0, 2 * math.pi, count)
    normal = np.stack([np.cos(angle), np.sin(angle), np.zeros(count)], axis=1)
    coord = radius * normal
    coord[:, 2] = rng.uniform(low, high, count)
    return Points(coord, normal, np.full(count, tone))


def ball(rng: np.random.Generator, height: float, radius: float, tone: int = 0) -> Points:
    """A rough sphere around (0, 0, height): leaves lie up to a third of the radius inside."""
    normal = rng.standard_normal((_count(rng, 4 * math.pi * radius**2), 3))
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    coord = normal * radius * rng.uniform(0.67, 1, (len(normal), 1))
    coord[:, 2] += height
    return Points(coord, normal, np.full(len(normal), tone))


def _count(rng: np.random.Generator, area: float) -> int:
    return max(1, int(rng.poisson(area * DENSITY)))


def _legs(rng: np.random.Generator, width: float, depth: float, height: float) -> list[Points]:
    """Four legs, 4 cm thick, at the corners."""
    t = 0.04
    x, y = width / 2 - t, depth / 2 - t
    corners = [(a, b) for a in (-x - t / 2, x) for b in (-y - t / 2, y)]
    return [box(rng, (a, b, 0), (a + t, b + t, height), 1, bottom=False) for a, b in corners]


# -- pieces ----------------------------------------------------------------------------------------


def table(rng: np.random.Generator) -> Piece:
    """A board on four legs."""
    w, d, h = rng.uniform(0.9, 1.4), rng.uniform(0.6, 0.85), rng.uniform(0.68, 0.78)
    top = box(rng, (-w / 2, -d / 2, h - 0.05), (w / 2, d / 2, h))
    return Piece(joined([top, *_legs(rng, w, d, h - 0.05)]), (w, d))


def chair(rng: np.random.Generator) -> Piece:
    """A seat and a back on four legs."""
    w, h = rng.uniform(0.4, 0.5), rng.uniform(0.42, 0.48)
    seat = box(rng, (-w / 2, -w / 2, h - 0.06), (w / 2, w / 2, h))
    back = box(rng, (-w / 2, -w / 2, h), (w / 2, 0.05 - w / 2, h + rng.uniform(0.4, 0.5)))
    return Piece(joined([seat, back, *_legs(rng, w, w, h - 0.06)]), (w, w))


def sofa(rng: np.random.Generator) -> Piece:
    """A seat with a back and two arms, down to the floor."""
    w, d, h = rng.uniform(1.3, 1.8), rng.uniform(0.75, 0.9), rng.uniform(0.38, 0.46)
    x, y = w / 2, d / 2
    back = box(rng, (-x, -y, 0), (x, 0.22 - y, h + rng.uniform(0.35, 0.45)), bottom=False)
    seat = box(rng, (0.18 - x, 0.22 - y, 0), (x - 0.18, y, h), bottom=False)
    arms = [
        box(rng, (a, 0.22 - y, 0), (a + 0.18, y, h + 0.18), bottom=False) for a in (-x, x - 0.18)
    ]
    return Piece(joined([back, seat, *arms]), (w, d))


def bed(rng: np.random.Generator) -> Piece:
    """A mattress with a board at its head and a pillow."""
    w, d, h = rng.uniform(0.95, 1.5), rng.uniform(1.8, 2.0), rng.uniform(0.4, 0.5)
    x, y = w / 2, d / 2
    board = box(rng, (-x, -y, 0), (x, 0.08 - y, h + 0.45), 1, bottom=False)
    mattress = box(rng, (-x, 0.08 - y, 0), (x, y, h), bottom=False)
    pillow = box(rng, (-0.7 * x, 0.15 - y, h), (0.7 * x, 0.5 - y, h + 0.12), bottom=False)
    return Piece(joined([board, mattress, pillow]), (w, d))


def cabinet(rng: np.random.Generator) -> Piece:
    """A high closed box."""
    w, d, h = rng.uniform(0.7, 1.2), rng.uniform(0.4, 0.55), rng.uniform(1.2, 1.75)
    return Piece(box(rng, (-w / 2, -d / 2, 0), (w / 2, d / 2, h), bottom=False), (w, d))


def lamp(rng: np.random.Generator) -> Piece:
    """A shade on a pole on a foot."""
    radius, h = rng.uniform(0.16, 0.24), rng.uniform(1.15, 1.45)
    foot = box(rng, (-0.13, -0.13, 0), (0.13, 0.13, 0.04), 1, bottom=False)
    shade = tube(rng, radius, h, h + rng.uniform(0.25, 0.35))
    return Piece(joined([shade, tube(rng, 0.025, 0.04, h, 1), foot]), (2 * radius, 2 * radius))


def plant(rng: np.random.Generator) -> Piece:
    """Leaves over a pot."""
    pot, radius = rng.uniform(0.13, 0.18), rng.uniform(0.24, 0.34)
    h = rng.uniform(0.28, 0.4)
    leaves = ball(rng, h + 0.8 * radius, radius)
    return Piece(joined([leaves, tube(rng, pot, 0, h, 1)]), (2 * radius, 2 * radius))


PIECES: dict[str, Callable[[np.random.Generator], Piece]] = {
    "table": table,
    "chair": chair,
    "sofa": sofa,
    "bed": bed,
    "cabinet": cabinet,
    "lamp": lamp,
    "plant": plant,
}
AT_WALLS = frozenset({"sofa", "bed", "cabinet"})  # stand with their backs to a wall
