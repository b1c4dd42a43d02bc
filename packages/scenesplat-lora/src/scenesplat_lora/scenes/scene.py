"""A scene in memory: a dict of arrays, most of them with one row per Gaussian.

    coord f32 [N, 3] metres            color f32 [N, 3] 0..255       opacity f32 [N, 1] 0..1
    scale f32 [N, 3] metres            quat f32 [N, 4] (w, x, y, z)  normal f32 [N, 3]
    segment i32 [N], -1: ignored       instance i32 [N], -1: none
    lang_feat f16 [N, D]               valid_feat_mask bool [N]
    pc_coord f32 [P, 3], pc_segment i32 [P]: a labelled point cloud with rows of its own

Functions on scenes give a new dict and leave the arrays that they were given as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_core.errors import DataError

Scene = dict[str, Any]

GAUSSIAN = ("coord", "color", "opacity", "scale", "quat")  # what every scene has
OWN_ROWS = ("pc_", "origin_")  # beginnings of the names of arrays whose rows are no Gaussians
NO_ROWS = frozenset({"inverse", "min_coord", "offset"})


@dataclass(frozen=True, eq=False)
class DeferredRows:
    """Rows of a large array that are copied once, where they are needed.

    Of a room with features of 768 each copy is 200 MB: steps that leave out rows change `index`.

    Attributes:
        source: [M, D], such as a mapped file.
        index: i64 [N], which of its rows these are.
    """

    source: NDArray[Any]
    index: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, D]."""
        return (len(self.index), *self.source.shape[1:])

    @property
    def ndim(self) -> int:
        """2, as of `source`."""
        return self.source.ndim

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of `source`."""
        return self.source.dtype

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: NDArray[Any]) -> DeferredRows:
        return DeferredRows(self.source, self.index[rows])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("rows that are deferred are no array yet: they must be copied")
        found = np.empty(self.shape, self.dtype)
        self.into(found)
        return found if dtype is None else found.astype(dtype, copy=False)

    def into(self, out: NDArray[Any]) -> None:
        """Copy the rows to `out` [N, D] of the same dtype."""
        # With mode "raise" numpy would fill an array of its own first.
        np.take(self.source, self.index, axis=0, out=out, mode="clip")


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
        if isinstance(value, (np.ndarray, DeferredRows))
        and not name.startswith(OWN_ROWS)
        and name not in NO_ROWS
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
    number = np.flatnonzero(rows) if rows.dtype == bool else rows
    return scene | {name: _taken(scene[name], number) for name in row_wise(scene)}


def _taken(values: Any, rows: NDArray[np.integer]) -> Any:
    """`values[rows]`; for arrays with few columns `take` needs a fourth of the time."""
    if isinstance(values, DeferredRows) or not values.flags.c_contiguous:
        return values[rows]  # `take` would copy all of an array in another order
    return np.asarray(values).take(rows, axis=0)  # of a mapped file too an array in memory


def deferred(scene: Scene) -> Scene:
    """The scene with its language features, where they are float16, copied as late as possible."""
    features = scene.get("lang_feat")
    if features is None or features.dtype != np.float16 or not features.flags.c_contiguous:
        return scene
    return scene | {"lang_feat": DeferredRows(features, np.arange(len(features)))}


def stable_order(values: NDArray[Any]) -> NDArray[np.int64]:
    """`np.argsort(values, kind="stable")` of u64 or f32 [N], by torch in a third of the time."""
    import torch

    if values.dtype == np.uint64:  # signed numbers in the same order
        values = (values ^ np.uint64(1 << 63)).view(np.int64)
    order: NDArray[np.int64] = torch.from_numpy(values).sort(stable=True).indices.numpy()
    return order


def lowest(values: NDArray[Any]) -> NDArray[Any]:
    """The least value of each column of [N, C]; [C].

    As `values.min(axis=0)`, which takes 20 times as long where C is 3.
    """
    return np.array([column.min() for column in values.T], dtype=values.dtype)


def highest(values: NDArray[Any]) -> NDArray[Any]:
    """The largest value of each column of [N, C]; [C]."""
    return np.array([column.max() for column in values.T], dtype=values.dtype)


def by_column(operation: np.ufunc, values: NDArray[Any], vector: NDArray[Any]) -> NDArray[Any]:
    """`operation(values, vector)` of [N, C] and [C], in a third of the time where C is 3."""
    found = np.empty(values.shape, np.result_type(values, vector))
    for number in range(values.shape[1]):
        # A slice and no number, whose dtype earlier versions of numpy do not count.
        operation(values[:, number], vector[number : number + 1], out=found[:, number])
    return found


def place(scene: Scene) -> str:
    """The scene's name for messages."""
    return str(scene.get("name", "scene"))
