"""Voxels of a scene, and one Gaussian per voxel.

    g = floor(coord / size),  g -= min g

in float64: in float32 a point on the border of two cells falls on either side, depending on how
large its coordinate is. Voxels are numbered by ascending unsigned 64-bit FNV hash of g, as in the
official preprocessing; two voxels with one hash, which it would unite, stay apart here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lora_core.errors import ConfigError, DataError
from scenesplat_lora.scenes.scene import (
    Scene,
    by_column,
    highest,
    lowest,
    place,
    stable_order,
    take_rows,
)

FNV_OFFSET, FNV_PRIME = np.uint64(14695981039346656037), np.uint64(1099511628211)
MOST_CELLS = 2**16  # per axis: the codes of space-filling curves have 16 bits of each coordinate
FARTHEST = 2**62  # cells from the origin that int64 still counts

Hash = Literal["fnv", "ravel"]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Voxels:
    """Which voxel each point belongs to.

    Attributes:
        grid: i64 [N, 3], integer cell of every point, the least one 0.
        low: f64 [3], metres of the cell 0's lower corner.
        order: i64 [N], points by voxel, and in their own order inside a voxel.
        first: i64 [V], where each voxel begins in `order`.
        count: i64 [V], points of each voxel.
    """

    grid: Rows
    low: NDArray[np.float64]
    order: Rows
    first: Rows
    count: Rows

    def inverse(self) -> Rows:
        """The voxel of every point, i64 [N]."""
        voxel = np.empty(len(self.order), dtype=np.int64)
        voxel[self.order] = np.repeat(np.arange(len(self.count)), self.count)
        return voxel

    def members(self, number: Rows | int) -> Rows:
        """One point of every voxel, i64 [V]: the one with this number, modulo its count."""
        return self.order[self.first + number % self.count]


def integer_cells(coord: NDArray[np.floating], size: float) -> tuple[Rows, NDArray[np.float64]]:
    """Cell of every point, i64 [N, 3] from 0, and the lower corner of cell 0, f64 [3].

    Raises:
        ConfigError: a size that is no positive number.
        DataError: no points, or points too far away to be counted in cells.
    """
    if not (math.isfinite(size) and size > 0):
        raise ConfigError(f"grid_size is {size!r}: it must be a number of metres above 0")
    if not len(coord):
        raise DataError("a scene without points has no voxels")
    cells = np.floor(coord.astype(np.float64) / size)
    if not (np.abs(cells) < FARTHEST).all():
        raise DataError("coord holds NaN, infinite or astronomical values: no cells to count")
    grid = cells.astype(np.int64)
    low = lowest(grid)
    return by_column(np.subtract, grid, low), low * size


def fnv_key(grid: Rows) -> NDArray[np.uint64]:
    """FNV hash of integer cells [N, 3]: for x, y, z first times the prime mod 2^64, then XOR."""
    key = np.full(len(grid), FNV_OFFSET)
    for axis in range(grid.shape[1]):
        key = (key * FNV_PRIME) ^ grid[:, axis].astype(np.uint64)
    return key


def ravel_key(grid: Rows) -> NDArray[np.uint64]:
    """((x (max y + 1)) + y) (max z + 1) + z of integer cells [N, 3].

    Raises:
        DataError: a grid of 2^64 cells or more, whose numbers would repeat.
    """
    extent = [int(side) + 1 for side in highest(grid)]
    if math.prod(extent) >= 2**64:
        raise DataError(f"a grid of {extent} cells has no 64-bit numbers: take the hash 'fnv'")
    x, y, z = grid.astype(np.uint64).T
    return (x * np.uint64(extent[1]) + y) * np.uint64(extent[2]) + z


def voxelise(coord: NDArray[np.floating], size: float, hash: Hash = "fnv") -> Voxels:
    """Sort the points [N, 3] into cells of `size` metres; errors as `integer_cells`."""
    grid, low = integer_cells(coord, size)
    key = fnv_key(grid) if hash == "fnv" else ravel_key(grid)
    order = stable_order(key)
    begins = _changes(grid.take(order, axis=0))
    if (begins & ~_changes(key[order])).any():  # two voxels share a hash and may lie interleaved
        order = np.lexsort((*grid.T[::-1], key))
        begins = _changes(grid.take(order, axis=0))
    first = np.flatnonzero(begins)
    return Voxels(grid, low, order, first, np.diff(first, append=len(order)))


def _changes(rows: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Whether each row differs from the one before; the first does."""
    differs = rows[1:] != rows[:-1]
    if differs.ndim == 2:  # faster than any(axis=1) where columns are few
        differs = np.logical_or.reduce([*differs.T])
    return np.concatenate([[True], differs])


def check_extent(voxels: Voxels, size: float, name: str) -> None:
    """Insist on a grid that the network's space-filling curves can number.

    Raises:
        DataError: more than 2^16 cells along an axis, with the smallest size that fits.
    """
    problem = too_many_cells(int(voxels.grid.max()) + 1, size)
    if problem:
        raise DataError(f"{name}: {problem}")


def too_many_cells(cells: int, size: float) -> str:
    """What is wrong with so many cells of `size` metres along an axis, and what fits; or ""."""
    if cells <= MOST_CELLS:
        return ""
    least = size * cells / (MOST_CELLS - 1)
    step = 10.0 ** (math.floor(math.log10(least)) - 2)
    least = math.ceil(least / step) * step  # three digits, none of them too low
    return (
        f"{cells} cells of {size:g} m along one axis, at most {MOST_CELLS} are possible: cut the "
        "scene into chunks, remove far outliers (are its coordinates metres?), or take "
        f"grid_size >= {least:.3g}"
    )


def grid_sample(
    scene: Scene,
    rng: np.random.Generator,
    *,
    grid_size: float = 0.02,
    hash_type: Hash = "fnv",
    return_inverse: bool = False,
    return_grid_coord: bool = True,
    return_min_coord: bool = False,
) -> Scene:
    """One random Gaussian of every voxel, voxels in order of their hash (GridSample, train mode).

    Member U{0 .. max count - 1} mod count is taken, as officially: nearly uniform, not wholly.

    Returns:
        The scene with, where asked for, `grid_coord` i64 [V, 3] (cells of the rows that stay),
        `inverse` i64 [N] (voxel of every row that was given), `min_coord` f64 [1, 3] (metres of
        cell 0).
    """
    voxels = _voxels_of(scene, grid_size, hash_type)
    if return_grid_coord:
        check_extent(voxels, grid_size, place(scene))
    rows = voxels.members(rng.integers(0, voxels.count.max(), len(voxels.count)))
    sampled = take_rows(scene, rows)
    if return_inverse:
        sampled["inverse"] = voxels.inverse()
    if return_grid_coord:
        sampled["grid_coord"] = voxels.grid.take(rows, axis=0)
    if return_min_coord:
        sampled["min_coord"] = voxels.low[None]
    return sampled


def fragments(scene: Scene, *, grid_size: float = 0.02, hash_type: Hash = "fnv") -> Iterator[Scene]:
    """Samples that cover every Gaussian (GridSample, test mode).

    Fragment i takes member i mod count of every voxel. Each has its `grid_coord` i64 [V, 3] and
    `index` i64 [V], the rows of the scene that it holds.
    """
    voxels = _voxels_of(scene, grid_size, hash_type)
    check_extent(voxels, grid_size, place(scene))
    for number in range(int(voxels.count.max())):
        rows = voxels.members(number)
        yield take_rows(scene, rows) | {
            "grid_coord": voxels.grid.take(rows, axis=0),
            "index": rows,
        }


def sample_labelled_cloud(
    scene: Scene, rng: np.random.Generator, *, grid_size: float = 0.02
) -> Scene:
    """One point of the labelled cloud per cell: the first with a label, else the first.

    Scenes without such a cloud stay as they are. Nothing is drawn from `rng`.
    """
    if "pc_coord" not in scene:
        return scene
    voxels = voxelise(scene["pc_coord"], grid_size)
    rows = first_preferred(voxels, scene["pc_segment"] != -1)
    return scene | {name: scene[name][rows] for name in ("pc_coord", "pc_segment")}


def first_preferred(voxels: Voxels, preferred: NDArray[np.bool_]) -> Rows:
    """Of every voxel the first point where `preferred` [N] holds, or its first point; i64 [V]."""
    rank = np.arange(len(voxels.order)) + np.where(preferred[voxels.order], 0, len(preferred))
    best = np.minimum.reduceat(rank, voxels.first) % len(preferred)
    return voxels.order[best]


def _voxels_of(scene: Scene, size: float, hash: Hash) -> Voxels:
    try:
        return voxelise(scene["coord"], size, hash)
    except DataError as error:
        raise DataError(f"{place(scene)}: {error}") from None
