"""Pictures of a scene's meshes and the map of their instances, by a z-buffer in numpy, without GL.

The camera stands on +z, looks at -z, and y is up in its pictures:

    t = distance - z          u = W/2 + f x / t          v = H/2 - f y / t

with f = H / (2 tan(fov / 2)); pixel (i, j) is the square around u = j + 0.5, v = i + 0.5. 1 / t is
linear in the picture, so that depths between the corners of a triangle are exact. Meshes are grey
under a lamp at the camera: textures are out of scope.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from midi3d_lora.meshes.mesh_loading import Mesh

AT_ONCE = 2**19  # candidate pixels that are compared at a time
NOTHING = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class Camera:
    """A pinhole camera on +z; the default shows all of [-0.95, 0.95]^3 with a small margin.

    Attributes:
        fov: degrees from the top of the picture to its bottom.
        distance: from the origin, in scene units.
    """

    fov: float = 40.0
    distance: float = 3.8

    def document(self, size: int) -> dict[str, Any]:
        """What camera.json says: the settings, and matrices as column-vector conventions have them.

        `world_to_camera` [4, 4] gives x right, y up, z towards the viewer; `intrinsics` [3, 3] maps
        (x, -y, -z) of the camera to pixels.
        """
        focal = self.focal(size)
        move = np.eye(4)
        move[2, 3] = -self.distance
        intrinsics = [[focal, 0.0, size / 2], [0.0, focal, size / 2], [0.0, 0.0, 1.0]]
        return {
            "convention": "right-handed, y up, camera on +z looking at -z, pixel centres at .5",
            **asdict(self),
            "width": size,
            "height": size,
            "world_to_camera": move.tolist(),
            "intrinsics": intrinsics,
        }

    def focal(self, size: int) -> float:
        """In pixels."""
        return size / (2 * math.tan(math.radians(self.fov) / 2))

    def project(self, points: NDArray[Any], size: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Pixel coordinates [..., 2] (u, v) and distances t [...] along z of points [..., 3].

        Raises:
            ValueError: points beside or behind the camera.
        """
        depth = self.distance - points[..., 2]
        if depth.size and depth.min() < 0.01 * self.distance:
            raise ValueError(
                f"the scene reaches z = {points[..., 2].max():.3g}, the camera stands at "
                f"{self.distance:g}: normalise the scene"
            )
        scale = self.focal(size) / depth
        u, v = size / 2 + scale * points[..., 0], size / 2 - scale * points[..., 1]
        return np.stack([u, v], axis=-1), depth


class Render(NamedTuple):
    """What a camera sees.

    Attributes:
        rgb: uint8 [S, S, 3], white background.
        instances: uint8 or uint16 [S, S]: 0 is background, k the k-th mesh.
        depth: f32 [S, S], distance along z from the camera; infinite where nothing is.
    """

    rgb: NDArray[np.uint8]
    instances: NDArray[Any]
    depth: NDArray[np.float32]


def render(
    meshes: Sequence[Mesh],
    size: int,
    camera: Camera | None = None,
    colours: NDArray[Any] | None = None,
) -> Render:
    """Draw meshes; edges are smooth in the picture (2 x 2 samples) and sharp in the map.

    Args:
        colours: [K, 3] of the meshes, 0..1; None: pale ones.

    Raises:
        ValueError: a mesh reaches the camera.
    """
    camera = camera or Camera()
    colours = pale_colours(len(meshes)) if colours is None else colours
    corners = np.concatenate([mesh.corners() for mesh in meshes])
    owner = np.repeat(np.arange(len(meshes)), [len(mesh.faces) for mesh in meshes])
    fine, _ = visible_faces(corners, 2 * size, camera)
    shades = _shades(corners, np.asarray(colours)[owner], camera)
    samples = np.where((fine >= 0)[..., None], shades[fine], 1.0)
    rgb = samples.reshape(size, 2, size, 2, 3).mean(axis=(1, 3))
    face, depth = visible_faces(corners, size, camera)
    kind = np.uint8 if len(meshes) < 256 else np.uint16
    instances = np.where(face >= 0, owner[face] + 1, 0).astype(kind)
    return Render(np.round(255 * rgb).astype(np.uint8), instances, depth)


def pale_colours(count: int) -> NDArray[np.float64]:
    """[count, 3] 0..1: hues the golden angle apart, so that neighbours differ."""
    hues = [colorsys.hsv_to_rgb(0.07 + 0.618034 * k % 1, 0.15, 0.9) for k in range(count)]
    return np.array(hues).reshape(-1, 3)


def _shades(
    corners: NDArray[np.float64], colours: NDArray[np.float64], camera: Camera
) -> NDArray[np.float64]:
    """[F, 3] colours 0..1: those of the faces times 0.3 + 0.7 |n . v|, v the way to the camera.

    Both sides of a face are lit, so that a face turned the wrong way is no hole.
    """
    a, b, c = corners.transpose(1, 0, 2)
    normal = np.cross(b - a, c - a)
    view = np.array([0, 0, camera.distance]) - (a + b + c) / 3
    length = np.linalg.norm(normal, axis=1) * np.linalg.norm(view, axis=1)
    light = np.abs((normal * view).sum(axis=1)) / np.maximum(length, 1e-30)
    return colours * (0.3 + 0.7 * light)[:, None]


# -- z-buffer --------------------------------------------------------------------------------------


def visible_faces(
    corners: NDArray[np.float64], size: int, camera: Camera
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The nearest triangle at each pixel's centre, and its distance there.

    Args:
        corners: [F, 3, 3] face, corner, coordinate.

    Returns:
        int64 [S, S] index of the face, -1 for none (of two at the same distance the first), and
        f32 [S, S] distance along z, infinite for none.
    """
    pixel, depth = camera.project(corners, size)
    # Distance in the upper half and face in the lower: positive floats are ordered as their bits.
    buffer = np.full(size * size, NOTHING, np.uint64)
    for faces, low, side in _batches(pixel, size):
        place, distance, face = _covered(pixel[faces], depth[faces], low, side, size, faces)
        bits = distance.astype(np.float32).view(np.uint32).astype(np.uint64)
        np.minimum.at(buffer, place, bits << np.uint64(32) | face.astype(np.uint64))
    empty = buffer == NOTHING
    nearest = (buffer >> np.uint64(32)).astype(np.uint32).view(np.float32)
    face = np.where(empty, -1, (buffer & np.uint64(2**32 - 1)).astype(np.int64))
    nearest = np.where(empty, np.float32(np.inf), nearest)
    return face.reshape(size, size), nearest.reshape(size, size)


def _batches(
    pixel: NDArray[np.float64], size: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], int]]:
    """Faces with boxes of about the same size: their indices, the boxes' corners, and their side.

    A box holds the pixels whose centres may be inside; those of a batch have side 1, 2, 4, ...
    """
    low = np.ceil(pixel.min(axis=1) - 0.5).clip(0, size).astype(np.int64)  # [F, 2]
    high = np.floor(pixel.max(axis=1) - 0.5).clip(-1, size - 1).astype(np.int64)
    extent = high - low + 1
    seen = (extent > 0).all(axis=1)
    power = np.ceil(np.log2(extent.max(axis=1).clip(1))).astype(np.int64)
    for exponent in np.unique(power[seen]).tolist():
        faces, side = np.flatnonzero(seen & (power == exponent)), 2**exponent
        step = max(1, AT_ONCE // side**2)
        for begin in range(0, len(faces), step):
            some = faces[begin : begin + step]
            yield some, low[some], side


def _covered(
    pixel: NDArray[np.float64],
    depth: NDArray[np.float64],
    low: NDArray[np.int64],
    side: int,
    size: int,
    faces: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Pixels inside of triangles: their place in the picture, the distance there, the face.

    With barycentric coordinates b_k >= 0, 1 / t = sum of b_k / t_k.
    """
    x = (low[:, 0, None] + np.arange(side))[:, None, :]  # [F, 1, side]
    y = (low[:, 1, None] + np.arange(side))[:, :, None]  # [F, side, 1]
    a, b, c = (pixel[:, k, :, None, None] for k in range(3))
    twice = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    scale = 1 / np.where(twice == 0, np.inf, twice)  # seen from the side a triangle has no area
    u, v = x + 0.5, y + 0.5

    def weight(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
        edge = (q[:, 0] - p[:, 0]) * (v - p[:, 1]) - (q[:, 1] - p[:, 1]) * (u - p[:, 0])
        return np.asarray(edge * scale)

    of_a, of_b, of_c = weight(b, c), weight(c, a), weight(a, b)
    inside = (of_a >= 0) & (of_b >= 0) & (of_c >= 0) & (twice != 0) & (x < size) & (y < size)
    face, row, column = np.nonzero(inside)
    weights = np.stack([some[inside] for some in (of_a, of_b, of_c)], axis=1)
    inverse = (weights / depth[face]).sum(axis=1) / weights.sum(axis=1)
    place = (low[face, 1] + row) * size + low[face, 0] + column
    return place, 1 / inverse, faces[face]
