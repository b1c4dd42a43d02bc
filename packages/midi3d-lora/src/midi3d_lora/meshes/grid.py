"""Grids of points in a box: their coordinates, the cells between them, and what is inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Values = NDArray[np.float32]  # [n, n, n] on a grid; axes in the order x, y, z
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Grid:
    """2^level + 1 points along each axis of a box, corners included.

    They are a part of the 2^depth + 1 points of the full grid, coordinate for coordinate: a value
    found on a coarse level need not be computed again on a finer one.
    """

    lower: tuple[float, float, float]
    upper: tuple[float, float, float]
    depth: int
    level: int

    @property
    def size(self) -> int:
        """Points along each axis."""
        return 2**self.level + 1

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.size, self.size, self.size)

    @property
    def cell(self) -> NDArray[np.float64]:
        """Sides of a cell, [3]."""
        return (np.array(self.upper) - np.array(self.lower)) / 2**self.level

    def at(self, level: int) -> Grid:
        return replace(self, level=level)

    def axes(self) -> list[NDArray[np.float32]]:
        """Coordinates along x, y and z."""
        full, step = 2**self.depth + 1, 2 ** (self.depth - self.level)
        return [
            np.linspace(low, high, full, dtype=np.float32)[::step]
            for low, high in zip(self.lower, self.upper, strict=True)
        ]

    def points(self, indices: Sequence[int] | NDArray[np.intp]) -> Tensor:
        """Coordinates, float32 [Q, 3], of the points with these numbers; z changes fastest."""
        numbers = np.unravel_index(np.asarray(indices, np.intp), self.shape)
        columns = [axis[i] for axis, i in zip(self.axes(), numbers, strict=True)]
        return torch.from_numpy(np.stack(columns, axis=1))

    def border(self) -> NDArray[np.intp]:
        """The numbers of the points on the faces of the box."""
        mask = np.ones(self.shape, bool)
        mask[1:-1, 1:-1, 1:-1] = False
        return np.flatnonzero(mask)


def cube(half_side: float, depth: int) -> Grid:
    """The full grid of a cube around the origin."""
    high = half_side
    return Grid((-high, -high, -high), (high, high, high), depth, depth)


def inside(values: Values) -> Mask:
    """Points inside; as marching cubes, which calls values > 0 outside."""
    return values <= 0


def surface_cells(values: Values) -> Mask:
    """Cells with corners inside and outside, [n-1, n-1, n-1]."""
    every = some = inside(values)
    for axis in range(3):
        low, high = _ends(axis)
        every = every[low] & every[high]
        some = some[low] | some[high]
    return some & ~every


def dilated(cells: Mask, margin: int) -> Mask:
    """The cells at most `margin` cells away from those of `cells`, over corners too."""
    for axis in range(3):
        low, high = _ends(axis)
        for _ in range(margin):
            grown = cells.copy()
            grown[high] |= cells[low]
            grown[low] |= cells[high]
            cells = grown
    return cells


def points_of_cells(cells: Mask) -> Mask:
    """The points that are corners of cells: [m, m, m] to [m+1, m+1, m+1]."""
    for axis in range(3):
        low, high = _ends(axis)
        shape = list(cells.shape)
        shape[axis] += 1
        points = np.zeros(shape, bool)
        points[low] |= cells
        points[high] |= cells
        cells = points
    return cells


def midpoints(values: Values) -> Values:
    """Values on the next finer level, [n, n, n] to [2n-1, 2n-1, 2n-1], by trilinear interpolation.

    The old points keep theirs.
    """
    for axis in range(3):
        low, high = _ends(axis)
        shape = list(values.shape)
        shape[axis] = 2 * shape[axis] - 1
        fine = np.empty(shape, np.float32)
        fine[_every_second(axis, 0)] = values
        fine[_every_second(axis, 1)] = 0.5 * (values[low] + values[high])
        values = fine
    return values


def _ends(axis: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """All but the last, and all but the first, along an axis."""
    whole = (slice(None),) * axis
    return (*whole, slice(None, -1)), (*whole, slice(1, None))


def _every_second(axis: int, start: int) -> tuple[slice, ...]:
    return (*(slice(None),) * axis, slice(start, None, 2))
