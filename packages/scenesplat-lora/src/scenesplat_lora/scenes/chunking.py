"""Large scenes cut into overlapping square columns, 6 m x 6 m every 3 m unless told otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_core.errors import ConfigError, DataError
from scenesplat_lora.scenes.grid_sample import Rows, Voxels, first_preferred, voxelise
from scenesplat_lora.scenes.scene import Scene, take_rows

MOST_WINDOWS = 100_000  # a city of 1 km x 1 km every 3 m


@dataclass(frozen=True)
class Chunks:
    """How scenes are cut.

    Attributes:
        range: sides of a window along x and y, metres.
        stride: steps between the windows' origins, metres.
        minimum: windows with fewer rows are left out.
        grid_size: before cutting, one row is kept per cell of this size in metres; None: all.
        most: the windows with the most rows, at most so many; None: all.
    """

    range: tuple[float, float] = (6, 6)
    stride: tuple[float, float] = (3, 3)
    minimum: int = 10_000
    grid_size: float | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        for name in ("range", "stride"):
            sides = getattr(self, name)
            if len(sides) != 2 or not all(math.isfinite(side) and side > 0 for side in sides):
                raise ConfigError(f"chunk {name} is {sides!r}: expected two lengths above 0")
        if self.minimum < 1:
            raise ConfigError(f"chunk minimum is {self.minimum}: it must be at least 1 row")
        if self.most is not None and self.most < 1:
            raise ConfigError(f"max_chunk_num is {self.most}: it must be at least 1, or none")

    def split(self, split: str) -> str:
        """Name of the folder of chunks, such as `train_grid1.0cm_chunk6x6_stride3x3`."""
        grid = "" if self.grid_size is None else f"_grid{self.grid_size * 100:.1f}cm"
        sides, steps = (
            "x".join(f"{side:g}" for side in pair) for pair in (self.range, self.stride)
        )
        return f"{split}{grid}_chunk{sides}_stride{steps}"


def cut_scene(scene: Scene, chunks: Chunks, rng: np.random.Generator) -> Iterator[Scene]:
    """The chunks of a scene, in the order of their numbers.

    Coordinates stay those of the scene. Usable rows of `lang_feat` get unit length, which they need
    not have in whole scenes.
    """
    coord = scene["coord"]
    kept = np.arange(len(coord))
    if chunks.grid_size is not None:
        kept = _rows_of_cells(scene, chunks.grid_size, rng)
    for rows in windows(coord[kept], chunks):
        # Of features, which may be larger than memory, those of one chunk are read at a time.
        yield _unit_features(take_rows(scene, kept[rows]))


def windows(coord: NDArray[np.floating], chunks: Chunks) -> list[Rows]:
    """Rows of each chunk, in their own order: x0 <= x < x0 + range, the same for y.

    Windows go along y first, then x; with `most` by falling number of rows. A scene smaller than a
    window is one chunk (the official windows are none there).

    Args:
        coord: [N, 3] metres.

    Raises:
        DataError: so many windows that they would not end.
    """
    plane = coord[:, :2] - coord[:, :2].min(axis=0)
    sides = plane.max(axis=0).astype(np.float64) + chunks.stride - np.array(chunks.range)
    count = np.maximum(sides / chunks.stride, 1).prod()
    if not count <= MOST_WINDOWS:
        raise DataError(
            f"{count:.3g} windows every {chunks.stride[0]:g} x {chunks.stride[1]:g} m, at most "
            f"{MOST_WINDOWS} are possible: take a larger stride, or remove far outliers (are its "
            "coordinates metres?)"
        )
    found = []
    for x in _origins(plane[:, 0], chunks.range[0], chunks.stride[0]):
        column = np.flatnonzero((plane[:, 0] >= x) & (plane[:, 0] < x + chunks.range[0]))
        height = plane[column, 1]
        for y in _origins(plane[:, 1], chunks.range[1], chunks.stride[1]):
            found.append(column[(height >= y) & (height < y + chunks.range[1])])
    if chunks.most is not None:
        found = sorted(found, key=len, reverse=True)[: chunks.most]
    return [rows for rows in found if len(rows) >= chunks.minimum]


def _origins(values: NDArray[np.floating], width: float, stride: float) -> NDArray[np.float64]:
    """0, stride, 2 stride, ... < max + stride - width; 0 alone where that is not positive."""
    end = float(values.max()) + stride - width
    return np.arange(0.0, end, stride) if end > 0 else np.zeros(1)


def one_per_cell(scene: Scene, size: float, rng: np.random.Generator) -> Scene:
    """One row of every cell: a random one with a usable language feature, else the first.

    Cells are counted from the scene's lower corner.
    """
    return take_rows(scene, _rows_of_cells(scene, size, rng))


def _rows_of_cells(scene: Scene, size: float, rng: np.random.Generator) -> Rows:
    voxels = voxelise(scene["coord"] - scene["coord"].min(axis=0), size)
    mask = scene.get("valid_feat_mask")
    if mask is None:
        return voxels.members(0)
    return _random_preferred(voxels, mask.astype(bool), rng)


def _random_preferred(
    voxels: Voxels, preferred: NDArray[np.bool_], rng: np.random.Generator
) -> Rows:
    """Of every voxel a random point where `preferred` [N] holds, or its first; i64 [V]."""
    wanted = preferred[voxels.order]
    count = np.add.reduceat(wanted.astype(np.int64), voxels.first)
    before: Rows = np.cumsum(wanted) - wanted  # wanted points before each, over all voxels
    number = before[voxels.first] + rng.integers(0, np.maximum(count, 1))
    rows = first_preferred(voxels, preferred)
    some = count > 0
    rows[some] = voxels.order[np.flatnonzero(wanted)[number[some]]]
    return rows


def _unit_features(scene: Scene) -> Scene:
    if "lang_feat" not in scene or "valid_feat_mask" not in scene:
        return scene
    features, mask = np.array(scene["lang_feat"]), scene["valid_feat_mask"].astype(bool)
    usable = features[mask].astype(np.float32)
    norm = np.linalg.norm(usable, axis=1, keepdims=True)
    features[mask] = usable / np.where(norm > 0, norm, 1)
    return scene | {"lang_feat": features}


def chunk_folder(split_folder: Path, scene: str, number: int) -> Path:
    """Folder of one chunk: `<scene>_<number>` in the folder of the chunked split."""
    return split_folder / f"{scene}_{number}"
