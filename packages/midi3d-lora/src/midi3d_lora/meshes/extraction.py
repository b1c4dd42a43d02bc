"""A field in space to a triangle mesh: coarse to fine, then marching cubes at zero.

Here every field is positive outside, like a distance, whatever its network gives. Only cells near
the surface are evaluated at full depth. They hold exactly what a dense grid holds, so the mesh is
the same; at depth 8 that is about a million of 17 million points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lora_core.errors import ConfigError, NumericError
from midi3d_lora.meshes import grid as lattice
from midi3d_lora.meshes.grid import Grid, Values

Field = Callable[[Tensor], Tensor]  # float32 [Q, 3] points to [Q] values

EXTENT = 1.005  # half the side of the box that is searched, as the official pipeline
PADDING = 0.05  # around the points inside, in the second pass
MARGIN = 2  # cells around the surface that are exact too: the smoothing reads them


@dataclass(frozen=True)
class Mesh:
    """Triangles of one instance, counter-clockwise seen from outside."""

    vertices: NDArray[np.float32]  # [V, 3] in the scene's frame
    faces: NDArray[np.int32]  # [F, 3]


@dataclass(frozen=True)
class ExtractionSettings:
    """How closely a field is looked at."""

    depth: int = 8  # 2^depth cells along each axis
    coarse_depth: int = 6  # of the grid that is evaluated everywhere
    inside: str = "auto"  # "negative" or "positive"; auto asks the faces of the box
    fit_box: bool = True  # spend the full depth on the instance's own box
    smooth: bool = True  # mean of 3 x 3 x 3 grid points, as the official pipeline
    chunk_size: int = 10_000  # points per call of the field

    def __post_init__(self) -> None:
        for name, limit in (("depth", 10), ("coarse_depth", 10), ("chunk_size", 10**9)):
            if not 1 <= getattr(self, name) <= limit:
                raise ConfigError(f"{name} {getattr(self, name)}: expected 1 ... {limit}")
        if self.inside not in ("auto", "negative", "positive"):
            raise ConfigError(f"inside {self.inside!r}: expected auto, negative or positive")


def extract_meshes(fields: Iterable[Field], settings: ExtractionSettings) -> Iterator[Mesh | None]:
    """A mesh for each field, one after the other; None for an empty one, which harms no other."""
    for field in fields:
        yield extract_mesh(field, settings)


def extract_mesh(field: Field, settings: ExtractionSettings) -> Mesh | None:
    """The zero surface of a field inside ±1.005, or None if there is none.

    With `fit_box` the surface is found twice: with half the resolution for the box of the points
    inside, and then at full depth in this box, of whatever size.

    Raises:
        NumericError: the field has values that are NaN or infinite.
    """
    first_depth = max(settings.depth - settings.fit_box, 1)
    grid = lattice.cube(EXTENT, first_depth)
    field = positive_outside(field, grid, settings)
    values = find_surface(field, grid, settings)
    if values is not None and settings.fit_box:
        lower, upper = inside_box(values, grid)
        close_grid = Grid(lower, upper, settings.depth, settings.depth)
        closer = find_surface(field, close_grid, settings)
        if closer is not None:
            grid, values = close_grid, closer
    return None if values is None else _mesh(values, grid, settings.smooth)


def _mesh(values: Values, grid: Grid, smooth: bool) -> Mesh | None:
    if smooth:
        mesh = marching_cubes(smoothed(values), grid)
        if mesh is not None:
            return mesh
    return marching_cubes(values, grid)  # the mean of a single point inside is outside


def positive_outside(field: Field, grid: Grid, settings: ExtractionSettings) -> Field:
    """The field, or its negative: positive where there is nothing.

    With `inside` "auto" the outside is the sign of most of the box's faces, as their median: an
    object may touch some of them, or reach beyond.
    """
    if settings.inside == "auto":
        coarse = grid.at(min(settings.coarse_depth, grid.depth))
        border = evaluate(field, coarse, coarse.border(), settings.chunk_size)
        negate = bool(np.median(border) < 0)
    else:
        negate = settings.inside == "positive"
    return (lambda points: -field(points)) if negate else field


def find_surface(field: Field, grid: Grid, settings: ExtractionSettings) -> Values | None:
    """Values on a whole grid, exact near the surface; None if no point is inside.

    A coarse grid may miss an object that lies between its points, so nothing is called empty
    before the full depth was tried. Where the coarse grid found something, it is followed: a part
    is lost only if it is thinner than a coarse cell and hangs on nothing.
    """
    for level in range(min(settings.coarse_depth, grid.depth), grid.depth + 1):
        coarse = grid.at(level)
        values = dense(field, coarse, settings.chunk_size)
        if lattice.inside(values).any():
            return refined(field, coarse, values, settings.chunk_size)
    return None


def dense(field: Field, grid: Grid, chunk_size: int) -> Values:
    """The field at every point of a grid."""
    return evaluate(field, grid, range(grid.size**3), chunk_size).reshape(grid.shape)


def refined(field: Field, coarse: Grid, values: Values, chunk_size: int) -> Values:
    """Exact values on a coarse level to values on the grid's full depth.

    Level by level they are interpolated, and those within `MARGIN` cells of the surface replaced by
    the field's own, until the surface that these show is surrounded by such values too.
    """
    known = np.ones(coarse.shape, bool)
    for level in range(coarse.level + 1, coarse.depth + 1):
        grid = coarse.at(level)
        values = lattice.midpoints(values)
        was_known, known = known, np.zeros(grid.shape, bool)
        known[::2, ::2, ::2] = was_known
        while (missing := _missing(values, known)).size:
            values.reshape(-1)[missing] = evaluate(field, grid, missing, chunk_size)
            known.reshape(-1)[missing] = True
    return values


def _missing(values: Values, known: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Numbers of the points near the surface that are interpolated."""
    near = lattice.dilated(lattice.surface_cells(values), MARGIN)
    return np.flatnonzero(lattice.points_of_cells(near) & ~known)


def evaluate(
    field: Field, grid: Grid, indices: Sequence[int] | NDArray[np.intp], chunk_size: int
) -> Values:
    """The field at points of a grid, given by their numbers; float32 [Q].

    Raises:
        NumericError: a value is NaN or infinite.
    """
    values = np.empty(len(indices), np.float32)
    for start in range(0, len(indices), chunk_size):
        chunk = slice(start, start + chunk_size)
        values[chunk] = field(grid.points(indices[chunk])).float().cpu().numpy()
    bad = len(values) - int(np.isfinite(values).sum())
    if bad:
        raise NumericError(
            f"the decoded field is NaN or infinite at {bad} of {len(values)} points: the latents "
            "or the autoencoder's weights are, or they overflow: decode in float32"
        )
    return values


def inside_box(
    values: Values, grid: Grid
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Lower and upper corner of the box of all points inside.

    Enlarged by a cell, in which the surface may still be, and by `PADDING`; at most ±1.055. There
    must be a point inside.
    """
    mask = lattice.inside(values)
    cell, limit = grid.cell, EXTENT + PADDING
    lower: list[float] = []
    upper: list[float] = []
    for axis, coordinates in enumerate(grid.axes()):
        others = tuple(a for a in range(3) if a != axis)
        hit = np.flatnonzero(mask.any(axis=others))
        enlarged = float(cell[axis]) + PADDING
        lower.append(max(float(coordinates[hit[0]]) - enlarged, -limit))
        upper.append(min(float(coordinates[hit[-1]]) + enlarged, limit))
    return (lower[0], lower[1], lower[2]), (upper[0], upper[1], upper[2])


def smoothed(values: Values) -> Values:
    """Mean of each point and its 26 neighbours; the border is continued by its own values.

    The official pipeline continues it by zeros, which bends surfaces that meet the box.
    """
    from scipy.ndimage import uniform_filter

    out: Values = uniform_filter(values, 3, mode="nearest")
    return out


def marching_cubes(values: Values, grid: Grid) -> Mesh | None:
    """The surface at 0 (Lewiner et al. 2003) of values that are positive outside; None without one.

    Grid point i is at lower + i / (n - 1) (upper - lower): the official pipeline divides by n,
    which shrinks and shifts what it finds, by 0.008 at the upper corner.
    """
    from skimage import measure

    if not lattice.surface_cells(values).any():
        return None
    # Lewiner's tables take the lower side for inside here, so that faces look outwards.
    vertices, faces, _, _ = measure.marching_cubes(values, 0.0, method="lewiner")
    placed = np.array(grid.lower) + vertices.astype(np.float64) * grid.cell
    return Mesh(placed.astype(np.float32), faces.astype(np.int32))
