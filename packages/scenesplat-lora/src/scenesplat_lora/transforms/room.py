"""Whether a list of transforms can work at all on scenes of some extent, known before they run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scenesplat_lora.scenes.grid_sample import too_many_cells
from scenesplat_lora.transforms.geometry import too_many_nodes
from scenesplat_lora.transforms.pipeline import NAMED, Spec

QUARTER = math.pi / 2


def room_problems(extent: Sequence[float], specs: Sequence[Spec]) -> list[str]:
    """What in a list of transforms cannot work for a scene of this extent (x, y, z in metres).

    Random transforms are taken as large as they can be, so that a run does not stop in an epoch in
    which the scene happens to lie askew.

    Args:
        specs: transforms as `build_transform` takes them, checked by it.
    """
    sides = np.array(extent, dtype=np.float64)
    problems = []
    for spec in specs:
        given = _arguments(spec)
        match spec["type"]:
            case "RandomRotate":
                low, high = given["angle"]
                sides = _turned(sides, given["axis"], max(abs(low), abs(high)) * math.pi)
            case "RandomRotateTargetAngle":
                sides = _turned(sides, given["axis"], QUARTER)
            case "RandomScale":
                sides = sides * max(given["scale"])
            case "ElasticDistortion":
                for granularity, magnitude in given["distortion_params"]:
                    problems.append(too_many_nodes(sides, granularity))
                    sides = sides + 2 * magnitude
            case "GridSample" if given["return_grid_coord"]:
                cells = math.ceil(sides.max() / given["grid_size"]) + 1
                problems.append(too_many_cells(cells, given["grid_size"]))
    return [problem for problem in problems if problem]


def _arguments(spec: Spec) -> Mapping[str, Any]:
    """A transform's arguments, those that are not given too."""
    known = inspect.signature(NAMED[spec["type"]]).parameters
    return {name: known[name].default for name in known} | dict(spec)


def _turned(sides: NDArray[np.float64], axis: str, most: float) -> NDArray[np.float64]:
    """Sides of the box around a box that was turned by up to `most` radians about an axis.

    |x cos t| + |y sin t|, at most x + y sin(most) and the diagonal.
    """
    i, j = (number for number in range(3) if number != "xyz".index(axis))
    a, b = sides[i], sides[j]
    sine, diagonal = math.sin(min(most, QUARTER)), math.hypot(a, b)
    turned = sides.copy()
    turned[i], turned[j] = min(a + b * sine, diagonal), min(b + a * sine, diagonal)
    return turned
