"""Transforms that move Gaussians: centres, quaternions, scales, normals, and the labelled cloud.

Defaults are the official training list's values. Rotations and flips act on quaternions
q = (w, x, y, z) in closed form, and do not bring them back to w >= 0: q and -q are one rotation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lora_core.errors import ConfigError
from scenesplat_lora.scenes.scene import Scene, by_column, highest, lowest

Array = NDArray[Any]
Axis = Literal["x", "y", "z"]
AXES = "xyz"
TINY = 1e-12  # metres; what is divided by in a scene of one point
MOST_NODES = 2**26  # of a noise grid: 0.8 GB; a room at 0.2 m has 10^5


def _move(scene: Scene, move: Callable[[Array], Array]) -> Scene:
    """The scene with all its positions moved, those of the labelled cloud too."""
    names = [name for name in ("coord", "pc_coord") if name in scene]
    return scene | {name: move(scene[name]).astype(np.float32) for name in names}


def box_centre(coord: Array) -> NDArray[np.float64]:
    """Centre of the bounding box of coord [N, 3], f64 [3]."""
    return (lowest(coord).astype(np.float64) + highest(coord)) / 2


# -- shifts and scales -----------------------------------------------------------------------------


def center_shift(scene: Scene, rng: np.random.Generator, *, apply_z: bool = True) -> Scene:
    """Move the bounding box's centre to x = y = 0 and, with `apply_z`, its floor to z = 0."""
    shift = box_centre(scene["coord"])
    shift[2] = scene["coord"][:, 2].min() if apply_z else 0
    return _move(scene, lambda coord: by_column(np.subtract, coord, shift))


def positive_shift(scene: Scene, rng: np.random.Generator) -> Scene:
    """Move the lowest corner of the bounding box to the origin."""
    low = lowest(scene["coord"])
    return _move(scene, lambda coord: by_column(np.subtract, coord, low))


def normalize_coord(scene: Scene, rng: np.random.Generator) -> Scene:
    """Centroid to the origin, then positions and scales divided by the largest distance from it."""
    centroid = scene["coord"].mean(axis=0, dtype=np.float64)
    radius = max(float(np.linalg.norm(scene["coord"] - centroid, axis=1).max()), TINY)
    return _scaled(_move(scene, lambda coord: coord - centroid), 1 / radius)


def random_scale(
    scene: Scene, rng: np.random.Generator, *, scale: Sequence[float] = (0.9, 1.1)
) -> Scene:
    """Positions and scales times one factor U(scale)."""
    low, high = scale
    return _scaled(scene, rng.uniform(low, high))


def _scaled(scene: Scene, factor: float) -> Scene:
    moved = _move(scene, lambda coord: coord * factor)
    if "scale" in scene:
        moved["scale"] = (scene["scale"] * factor).astype(np.float32)
    return moved


# -- rotations and flips ---------------------------------------------------------------------------


def random_rotate(
    scene: Scene,
    rng: np.random.Generator,
    *,
    angle: Sequence[float] = (-1, 1),
    axis: Axis = "z",
    center: Sequence[float] | None = None,
    p: float = 0.5,
    always_apply: bool = False,
) -> Scene:
    """With probability p rotate by U(angle) pi about an axis through `center` or the box centre."""
    if not always_apply and rng.random() >= p:
        return scene
    low, high = angle
    return rotate(scene, rng.uniform(low, high) * math.pi, axis, center)


def random_rotate_target_angle(
    scene: Scene,
    rng: np.random.Generator,
    *,
    angle: Sequence[float] = (1 / 2, 1, 3 / 2),
    axis: Axis = "z",
    center: Sequence[float] | None = None,
    p: float = 0.75,
    always_apply: bool = False,
) -> Scene:
    """With probability p rotate by one of the angles, in units of pi."""
    if not always_apply and rng.random() >= p:
        return scene
    return rotate(scene, float(rng.choice(list(angle))) * math.pi, axis, center)


def rotation_matrix(axis: Axis, radians: float) -> NDArray[np.float64]:
    """Right-handed rotation about an axis, f64 [3, 3]; x' = R x for column vectors."""
    number = _axis_number(axis)
    i, j = (number + 1) % 3, (number + 2) % 3
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = math.cos(radians)
    matrix[j, i] = math.sin(radians)
    matrix[i, j] = -matrix[j, i]
    return matrix


def rotate(
    scene: Scene, radians: float, axis: Axis = "z", center: Sequence[float] | None = None
) -> Scene:
    """Rotate a scene: x' = R (x - c) + c, n' = R n, q' = q_R ⊗ q."""
    matrix = rotation_matrix(axis, radians)
    origin = box_centre(scene["coord"]) if center is None else np.asarray(center, dtype=np.float64)

    def around_origin(coord: Array) -> Array:
        return by_column(np.add, by_column(np.subtract, coord, origin) @ matrix.T, origin)

    turned = _move(scene, around_origin)
    if "normal" in scene:
        turned["normal"] = (scene["normal"] @ matrix.T).astype(np.float32)
    if "quat" in scene:
        turn = np.zeros(4)
        turn[0], turn[1 + _axis_number(axis)] = math.cos(radians / 2), math.sin(radians / 2)
        turned["quat"] = quaternion_product(turn, scene["quat"]).astype(np.float32)
    return turned


def _axis_number(axis: str) -> int:
    if axis not in ("x", "y", "z"):
        raise ConfigError(f"axis is {axis!r}: it must be 'x', 'y' or 'z'")
    return AXES.index(axis)


def quaternion_product(a: Array, b: Array) -> Array:
    """a ⊗ b of quaternions (w, x, y, z), [4] and [N, 4]: first the rotation b, then a."""
    w, x, y, z = a
    left = np.array([[w, -x, -y, -z], [x, w, -z, y], [y, z, w, -x], [z, -y, x, w]])
    return b @ left.T


def random_flip(scene: Scene, rng: np.random.Generator, *, p: float = 0.5) -> Scene:
    """Mirror x, and independently y, each with probability p."""
    for axis in ("x", "y"):
        if rng.random() < p:
            scene = flip(scene, axis)
    return scene


def flip(scene: Scene, axis: str) -> Scene:
    """Mirror one axis: x' = F x, n' = F n, and the rotation M of a Gaussian becomes F M F.

    F M F turns by the opposite angle about the mirrored axis: of q, the components of the other
    two axes change sign.
    """
    number = _axis_number(axis)
    mirror = np.ones(3, dtype=np.float32)
    mirror[number] = -1
    flipped = _move(scene, lambda coord: by_column(np.multiply, coord, mirror))
    if "normal" in scene:
        flipped["normal"] = by_column(np.multiply, scene["normal"], mirror)
    if "quat" in scene:
        signs = np.concatenate([[1], -mirror]).astype(np.float32)
        flipped["quat"] = by_column(np.multiply, scene["quat"], signs)
    return flipped


# -- noise: only the centres move ------------------------------------------------------------------


def random_jitter(
    scene: Scene, rng: np.random.Generator, *, sigma: float = 0.005, clip: float = 0.01
) -> Scene:
    """coord += clip(N(0, sigma²), ±clip) per coordinate, in metres."""
    noise = rng.standard_normal(scene["coord"].shape, dtype=np.float32)
    return scene | {"coord": scene["coord"] + np.clip(sigma * noise, -clip, clip)}


def elastic_distortion(
    scene: Scene,
    rng: np.random.Generator,
    *,
    distortion_params: Sequence[Sequence[float]] = ((0.2, 0.4), (0.8, 1.6)),
    p: float = 0.95,
) -> Scene:
    """With probability p bend space by smooth noise, once for each (granularity, magnitude)."""
    coord = scene["coord"]
    if distortion_params and rng.random() < p:
        for granularity, magnitude in distortion_params:
            coord = distort(coord, granularity, magnitude, rng)
    return scene | {"coord": coord}


def distort(
    coord: Array, granularity: float, magnitude: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """coord + magnitude · noise(coord): N(0, 1) on nodes every `granularity` metres, smoothed.

    The nodes begin one step below the scene's lowest corner; between them noise is trilinear.

    Raises:
        ConfigError: a scene too large for a noise grid this fine.
    """
    low = lowest(coord)
    sides = highest(coord) - low
    nodes = _nodes(sides, granularity)
    problem = too_many_nodes(sides, granularity)
    if problem:
        raise ConfigError(problem)
    noise = rng.standard_normal((*nodes, 3), dtype=np.float32)
    for axis in (0, 1, 2) * 2:
        noise = box_filter(noise, axis)
    at = by_column(np.subtract, coord, low) / granularity + 1
    return (coord + magnitude * trilinear(noise, at)).astype(np.float32)


def too_many_nodes(sides: Array, granularity: float) -> str:
    """What is wrong with a noise grid over a box [3] in metres, or ""."""
    nodes = _nodes(sides, granularity).tolist()
    if math.prod(nodes) <= MOST_NODES:
        return ""
    return (
        f"ElasticDistortion: {' x '.join(map(str, nodes))} nodes every {granularity:g} m are too "
        f"many (at most {MOST_NODES}): cut the scene into chunks, remove far outliers, or take a "
        "larger granularity"
    )


def _nodes(sides: Array, granularity: float) -> NDArray[np.int64]:
    return np.minimum(sides // granularity, 2.0**40).astype(np.int64) + 3


def box_filter(values: Array, axis: int) -> Array:
    """Mean of each value and its two neighbours along an axis, zero beyond the border."""
    values = np.moveaxis(values, axis, 0)
    total = values.copy()
    total[1:] += values[:-1]
    total[:-1] += values[1:]
    return np.moveaxis(total / 3, 0, axis)


def trilinear(values: Array, at: Array) -> Array:
    """`values` [X, Y, Z, C] between its nodes, at positions [N, 3] in units of nodes; [N, C]."""
    # Nodes by one number each, an axis and a channel at a time, without new memory for each corner:
    # some times as fast as values[i, j, k].
    steps = (values.shape[1] * values.shape[2], values.shape[2], 1)
    first = np.zeros(len(at), dtype=np.int64)
    weights = []  # [N] of the lower and of the upper node along each axis
    for along, nodes, step in zip(at.T, values.shape[:3], steps, strict=True):
        node = np.clip(np.floor(along).astype(np.int64), 0, nodes - 2)
        share = (along - node).astype(values.dtype)
        weights.append((1 - share, share))
        first += node * step
    channels = np.ascontiguousarray(np.moveaxis(values, -1, 0)).reshape(values.shape[3], -1)
    total = np.zeros((values.shape[3], len(at)), dtype=values.dtype)
    term = np.empty(len(at), dtype=values.dtype)
    for corner in np.ndindex(2, 2, 2):
        weight = weights[0][corner[0]] * weights[1][corner[1]] * weights[2][corner[2]]
        number = first + np.dot(corner, steps)
        for channel, values_here in zip(total, channels, strict=True):
            np.take(values_here, number, out=term, mode="clip")
            term *= weight
            channel += term
    return np.ascontiguousarray(total.T)
