"""A posed image: its camera, and where its files are.

    x = R X + t,   (a, b) = (x_1, x_2) / x_3,   u = fx a' + cx,   v = fy b' + cy

for a point X of the world; x_1 to the right, x_2 down, x_3 forward (OpenCV, COLMAP). The centre of
the upper left pixel is (u, v) = (0.5, 0.5). A lens bends by OpenCV's rule with k1, k2, p1, p2, k3:

    s  = a^2 + b^2,   g = 1 + k1 s + k2 s^2 + k3 s^3
    a' = a g + 2 p1 a b + p2 (s + 2 a^2),   b' = b g + p1 (s + 2 b^2) + 2 p2 a b
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_core.errors import DataError
from lora_core.pictures.files import SUFFIXES

Matrix = NDArray[np.float64]
ORTHONORMAL = 1e-3  # largest |R R^T - 1| of what was written with a few digits
MOST_PIXELS = 65_536  # of a side
STRAIGHT = (0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class View:
    """One image of a scene.

    Attributes:
        key: the image's path below its folder of images, without suffix: what masks and features
            of the image are called.
        image: the file; it may be missing.
        focal: fx, fy. centre: cx, cy; None: the middle. All in pixels.
        size: (height, width) in pixels; None: that of the image.
        rotation: R, [3, 3]. translation: t, [3].
        bend: k1, k2, p1, p2, k3.
    """

    key: str
    image: Path
    focal: tuple[float, float]
    centre: tuple[float, float] | None
    size: tuple[int, int] | None
    rotation: Matrix
    translation: Matrix
    bend: tuple[float, float, float, float, float] = STRAIGHT

    def sized(self, size: tuple[int, int]) -> View:
        """The view with the size of its image, where the camera's file does not say it."""
        height, width = size
        return replace(self, size=size, centre=self.centre or (width / 2, height / 2))

    def placed(self, turn: Matrix, unit: float) -> View:
        """The view in a world that was turned and scaled, X' = unit turn X."""
        return replace(self, rotation=self.rotation @ turn.T, translation=self.translation * unit)

    def reach(self) -> float:
        """The largest a^2 + b^2 up to which farther points lie farther from the centre.

        Beyond it the rule folds the picture back, which no lens does.
        """
        k1, k2, _, _, k3 = self.bend
        roots = np.roots([7 * k3, 5 * k2, 3 * k1, 1])
        real = roots[np.abs(roots.imag) < 1e-9].real
        return float(real[real > 0].min(initial=np.inf))


def image_key(name: str) -> str:
    """The path of an image below its folder, without the suffix of a picture.

    Raises:
        DataError: no name of a file.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if not path.name:
        raise DataError(f"file name {name!r}: no file can have it")
    return str(path.with_suffix("") if path.suffix.lower() in SUFFIXES else path)


# -- what a file says ------------------------------------------------------------------------------


def numbers(value: Any, shape: tuple[int, ...], what: str) -> Matrix:
    """Finite numbers of a shape, as float64.

    Raises:
        DataError: anything else.
    """
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{what} is {str(value)[:60]!r}: expected numbers") from None
    if array.shape != shape:
        raise DataError(f"{what} has shape {list(array.shape)}: expected {list(shape)}")
    if not np.isfinite(array).all():
        raise DataError(f"{what} is not finite: {str(value)[:60]}")
    return array


def rotation(matrix: Matrix, what: str) -> Matrix:
    """The rotation nearest to a matrix [3, 3] that is one but for rounding.

    Raises:
        DataError: it scales, shears or mirrors.
    """
    off = np.abs(matrix @ matrix.T - np.eye(3)).max()
    if off > ORTHONORMAL or np.linalg.det(matrix) < 0:
        why = "it mirrors" if off <= ORTHONORMAL else f"R R^T differs from 1 by {off:.2g}"
        raise DataError(f"{what} is no rotation: {why}")
    left, _, right = np.linalg.svd(matrix)
    result: Matrix = left @ right
    return result


def from_camera_to_world(matrix: Matrix, what: str, opengl: bool) -> tuple[Matrix, Matrix]:
    """R and t of a camera-to-world matrix [4, 4] or [3, 4].

    Args:
        opengl: x_2 is up and x_3 backward in it.

    Raises:
        DataError: no rotation and position.
    """
    if matrix.shape[0] == 4 and np.abs(matrix[3] - [0, 0, 0, 1]).max() > 1e-6:
        raise DataError(f"{what}: its last row is {matrix[3].tolist()}, expected 0, 0, 0, 1")
    turn = rotation(matrix[:3, :3], what) * ([1, -1, -1] if opengl else [1, 1, 1])
    return turn.T, -turn.T @ matrix[:3, 3]


def pixels(value: Any, what: str) -> int:
    """A side of an image.

    Raises:
        DataError: no whole number above 0.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1:
        raise DataError(f"{what} is {str(value)[:60]!r}: expected a number of pixels")
    if not 0 < value <= MOST_PIXELS:
        raise DataError(f"{what} is {value}: expected 1 to {MOST_PIXELS} pixels")
    return int(value)


def focal_lengths(values: Sequence[Any], what: str) -> tuple[float, float]:
    """fx and fy.

    Raises:
        DataError: not above 0.
    """
    x, y = numbers(values, (2,), what)
    if not min(x, y) > 0:
        raise DataError(f"{what} is {x}, {y}: focal lengths are pixels above 0")
    return float(x), float(y)
