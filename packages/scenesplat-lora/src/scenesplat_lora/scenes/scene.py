"""A scene in memory: a dict of arrays, most of them with one row per Gaussian.

    coord f32 [N, 3] metres            color f32 [N, 3] 0..255       opacity f32 [N, 1] 0..1
    scale f32 [N, 3] metres            quat f32 [N, 4] (w, x, y, z)  normal f32 [N, 3]
    segment i32 [N], -1: ignored       instance i32 [N], -1: none
    lang_feat f16 [N, D]               valid_feat_mask bool [N]
    pc_coord f32 [P, 3], pc_segment i32 [P]: a labelled point cloud with rows of its own

Functions on scenes give a new dict and leave the arrays that they were given as they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_core.errors import DataError

Scene = dict[str, Any]

GAUSSIAN = ("coord", "color", "opacity", "scale", "quat")  # what every scene has
OWN_ROWS = ("pc_", "origin_")  # beginnings of the names of arrays whose rows are no Gaussians
NO_ROWS = frozenset({"inverse", "min_coord", "offset"})


def row_count(scene: Scene) -> int:
    """The number of Gaussians."""
    return len(scene["coord"])


def row_wise(scene: Scene) -> list[str]:
    """Names of the arrays with one row per Gaussian.

    They are told by name and not by length: a labelled cloud may have as many rows by chance.

    Raises:
        DataError: arrays with another number of rows, all of them.
    """
    names = [
        name
        for name, value in scene.items()
        if isinstance(value, np.ndarray) and not name.startswith(OWN_ROWS) and name not in NO_ROWS
    ]
    rows = row_count(scene)
    wrong = [
        f"{name} {scene[name].shape}"
        for name in names
        if scene[name].ndim == 0 or len(scene[name]) != rows
    ]
    if wrong:
        raise DataError(f"coord has {rows} rows, but {', '.join(wrong)}: expected as many rows")
    return names


def take_rows(scene: Scene, rows: NDArray[Any]) -> Scene:
    """The scene of some Gaussians only, in the order of `rows` (integers, or bool [N])."""
    return scene | {name: scene[name][rows] for name in row_wise(scene)}


def lowest(values: NDArray[Any]) -> NDArray[Any]:
    """The least value of each column of [N, C]; [C].

    As `values.min(axis=0)`, which takes 20 times as long where C is 3.
    """
    return np.array([column.min() for column in values.T], dtype=values.dtype)


def highest(values: NDArray[Any]) -> NDArray[Any]:
    """The largest value of each column of [N, C]; [C]."""
    return np.array([column.max() for column in values.T], dtype=values.dtype)


def place(scene: Scene) -> str:
    """The scene's name for messages."""
    return str(scene.get("name", "scene"))
