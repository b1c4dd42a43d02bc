"""The frame of a scene: right-handed, y up, all instances together inside [-1, 1]^3."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

HALF_EXTENT = 0.95  # largest half-extent of a scene that was normalised
BOUND = 1.05  # largest |coordinate| that still counts as normalised


@dataclass(frozen=True)
class SceneFrame:
    """p -> (p - centre) * scale: one centre and one scale for all instances of a scene.

    Attributes:
        centre: of the common bounding box, in the units of the source.
        scale: scene units per unit of the source.
    """

    centre: tuple[float, float, float]
    scale: float

    def apply(self, points: NDArray[Any]) -> NDArray[np.float64]:
        """[..., 3] points of the source in the scene's frame; computed in float64."""
        return (np.asarray(points, np.float64) - np.array(self.centre)) * self.scale


def fit_frame(low: NDArray[Any], high: NDArray[Any]) -> SceneFrame:
    """The frame in which the box from `low` [3] to `high` [3] is centred and fits.

    The box counts and not the mean of the vertices, which depends on the tessellation.

    Raises:
        ValueError: the box is a point, or not finite.
    """
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    half = float((high - low).max()) / 2
    if not (math.isfinite(half) and half > 0):
        raise ValueError(f"the scene has the half-extent {half}, expected more than 0")
    x, y, z = ((low + high) / 2).tolist()
    return SceneFrame((x, y, z), HALF_EXTENT / half)


def turn(up: str, yaw: float) -> NDArray[np.float64]:
    """[3, 3] rotation to y up, followed by one around y.

    Args:
        up: axis that points up in the source, "y" or "z". z up goes (x, y, z) -> (x, z, -y), so
            that what lies at -y, the front of most z-up tools, faces +z.
        yaw: degrees, counter-clockwise seen from above.
    """
    to_y_up = np.eye(3) if up == "y" else np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
    angle = math.radians(yaw)
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]]) @ to_y_up
