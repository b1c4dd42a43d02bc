"""Boxes, frustums, balls and rings: exact signed distances and triangles of the same surfaces.

A part p is one of these in its own frame, turned by R and moved to c. Its distance at x is that of
its kind at Rᵀ (x - c); an object is the union of its parts, min over their distances, exact outside
and with the exact zero surface. The formulas are those of Quilez, "3D SDF functions". Numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from midi3d_lora.meshes.mesh_loading import Mesh, joined
from midi3d_lora.scenes.scene_frame import SceneFrame

SIDES = 24  # of round parts; their edges are 0.9 % of the radius inside the true surface at most

Floats = NDArray[np.float64]
Size = tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Part:
    """A solid in space.

    Attributes:
        kind: see `size`.
        size: box: half extents x, y, z. frustum: half height along y, radius below, radius above.
            ball: radius. ring: radius of the circle in the x z plane, radius of the tube.
        centre: c, f64 [3].
        rotation: R, f64 [3, 3].
    """

    kind: str
    size: Size
    centre: Floats = field(default_factory=lambda: np.zeros(3))
    rotation: Floats = field(default_factory=lambda: np.eye(3))

    def distance(self, points: Floats) -> Floats:
        """Signed distances f64 [N] at points [N, 3], negative inside."""
        return DISTANCES[self.kind]((points - self.centre) @ self.rotation, *self.size)

    def mesh(self) -> Mesh:
        """Its surface, closed, faces counter-clockwise seen from outside."""
        vertices, faces = SURFACES[self.kind](*self.size)
        return Mesh(self.kind, vertices @ self.rotation.T + self.centre, faces)


@dataclass(frozen=True, eq=False)
class Solid:
    """An object: the union of parts.

    Attributes:
        name: what it is, as "chair".
    """

    name: str
    parts: tuple[Part, ...]

    def distance(self, points: Floats) -> Floats:
        """Signed distances f64 [N] at points [N, 3], negative inside; there an upper bound."""
        values: Floats = np.min([part.distance(points) for part in self.parts], axis=0)
        return values

    def mesh(self) -> Mesh:
        """The surfaces of its parts, in one mesh."""
        return joined([part.mesh() for part in self.parts], self.name)

    def moved(self, offset: Sequence[float], yaw: float = 0.0) -> Solid:
        """Turned around y by `yaw` radians, and then moved by `offset`."""
        turn = around_y(yaw)
        return self._each(
            lambda part: replace(
                part, centre=turn @ part.centre + offset, rotation=turn @ part.rotation
            )
        )

    def in_frame(self, frame: SceneFrame) -> Solid:
        """The same object in a scene's frame."""
        return self._each(
            lambda part: replace(
                part,
                centre=frame.apply(part.centre),
                size=tuple(frame.scale * one for one in part.size),
            )
        )

    def _each(self, change: Callable[[Part], Part]) -> Solid:
        return replace(self, parts=tuple(change(part) for part in self.parts))


def around_y(angle: float) -> Floats:
    """[3, 3] rotation by radians, counter-clockwise seen from above."""
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])


def on_its_side(axis: str) -> Floats:
    """[3, 3] rotation that lays y along "x" or "z"."""
    along_x = np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]])
    along_z = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    return {"x": along_x, "z": along_z}[axis]


# -- distances in the part's own frame -------------------------------------------------------------


def box_distance(points: Floats, x: float, y: float, z: float) -> Floats:
    """|max(q, 0)| + min(max(q), 0), with q = |p| - half extents."""
    q = np.abs(points) - np.array([x, y, z])
    outside = np.linalg.norm(np.maximum(q, 0), axis=1)
    return np.asarray(outside + np.minimum(q.max(axis=1), 0))


def frustum_distance(points: Floats, half: float, below: float, above: float) -> Floats:
    """In the plane of radius and height: to the nearer of a cap and the slanted side."""
    radius, height = np.hypot(points[:, 0], points[:, 2]), points[:, 1]
    cap = np.where(height < 0, below, above)
    to_cap = np.stack([radius - np.minimum(radius, cap), np.abs(height) - half])
    slant = np.array([above - below, 2 * half])
    from_top = np.stack([above - radius, half - height])
    share = np.clip(slant @ from_top / (slant @ slant), 0, 1)
    to_side = -from_top + slant[:, None] * share
    inside = (to_side[0] < 0) & (to_cap[1] < 0)
    nearest = np.minimum((to_cap**2).sum(axis=0), (to_side**2).sum(axis=0))
    return np.where(inside, -1.0, 1.0) * np.sqrt(nearest)


def ball_distance(points: Floats, radius: float) -> Floats:
    """|p| - r."""
    return np.asarray(np.linalg.norm(points, axis=1) - radius)


def ring_distance(points: Floats, radius: float, tube: float) -> Floats:
    """|(√(x² + z²) - R, y)| - r."""
    return np.hypot(np.hypot(points[:, 0], points[:, 2]) - radius, points[:, 1]) - tube


# -- surfaces in the part's own frame --------------------------------------------------------------


def box_surface(x: float, y: float, z: float) -> tuple[Floats, NDArray[np.int64]]:
    """8 vertices, 12 faces."""
    corners = np.array([(i, j, k) for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)], np.float64)
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = [(a, b, c) for a, b, c, _ in quads] + [(a, c, d) for a, _, c, d in quads]
    return corners * [x, y, z], np.array(faces)


def frustum_surface(half: float, below: float, above: float) -> tuple[Floats, NDArray[np.int64]]:
    """A side and two caps; a radius of 0 is a tip."""
    profile = [(0.0, -half), (below, -half), (above, half), (0.0, half)]
    kept = [profile[0], *(point for point in profile[1:3] if point[0] > 0), profile[3]]
    return revolved(kept)


def ball_surface(radius: float) -> tuple[Floats, NDArray[np.int64]]:
    """Circles of latitude."""
    angles = np.linspace(-math.pi / 2, math.pi / 2, SIDES // 2 + 1)
    profile = [(radius * math.cos(a), radius * math.sin(a)) for a in angles]
    return revolved([(0.0, -radius), *profile[1:-1], (0.0, radius)])


def ring_surface(radius: float, tube: float) -> tuple[Floats, NDArray[np.int64]]:
    """Circles around y."""
    angles = 2 * math.pi * np.arange(SIDES // 2) / (SIDES // 2)
    profile = np.stack([radius + tube * np.cos(angles), tube * np.sin(angles)], axis=1)
    count = len(profile)
    below = np.arange(count)
    return _turned(profile), _bands(below, (below + 1) % count, count)


def revolved(profile: Sequence[tuple[float, float]]) -> tuple[Floats, NDArray[np.int64]]:
    """A profile of (radius, height) from below to above, turned around y; both ends are tips."""
    points = np.array(profile)
    rings = np.arange(len(points) - 1)
    faces = _bands(rings, rings + 1, len(points))
    vertices = _turned(points)
    # The vertices of a tip are one place; faces between two of them have no area.
    place = np.unique(vertices.round(12), axis=0, return_inverse=True)[1].reshape(-1)[faces]
    flat = (place == np.roll(place, 1, axis=1)).any(axis=1)
    return vertices, faces[~flat]


def _turned(profile: Floats) -> Floats:
    """Vertices [P SIDES, 3], ring after ring, of a profile [P, 2]."""
    angles = 2 * math.pi * np.arange(SIDES) / SIDES
    radius, height = profile[:, :1], profile[:, 1:]
    x, z = radius * np.cos(angles), radius * np.sin(angles)
    return np.stack([x, np.broadcast_to(height, x.shape), z], axis=-1).reshape(-1, 3)


def _bands(lower: NDArray[np.int64], upper: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Two triangles for each side between rings `lower[i]` and `upper[i]`."""
    assert max(lower.max(), upper.max()) < count
    side = np.arange(SIDES)
    after = (side + 1) % SIDES
    a, b = lower[:, None] * SIDES + side, lower[:, None] * SIDES + after
    c, d = upper[:, None] * SIDES + side, upper[:, None] * SIDES + after
    return np.concatenate(
        [np.stack([a, c, b], axis=-1).reshape(-1, 3), np.stack([b, c, d], axis=-1).reshape(-1, 3)]
    )


DISTANCES: dict[str, Callable[..., Floats]] = {
    "box": box_distance,
    "frustum": frustum_distance,
    "ball": ball_distance,
    "ring": ring_distance,
}
SURFACES: dict[str, Callable[..., tuple[Floats, NDArray[np.int64]]]] = {
    "box": box_surface,
    "frustum": frustum_surface,
    "ball": ball_surface,
    "ring": ring_surface,
}
