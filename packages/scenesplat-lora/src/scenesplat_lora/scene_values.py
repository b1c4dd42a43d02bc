"""What the arrays of a scene on disk mean, data set by data set, and which values they may hold.

Each check gives the array as the network's data has it, or a DataError. What is repaired by rule is
said in `notes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_core.errors import DataError

Array = NDArray[Any]
FAR = 1e5  # metres; float32 has steps of 8 mm there, and of less than half a voxel below


@dataclass(frozen=True)
class Layout:
    """What the folders of one data set hold.

    Attributes:
        segment: name of the label file, without .npy; `pc_` before it for the labelled cloud.
        column: which column of [N, k] labels counts; None: labels are [N] or [N, 1].
        scales: metres, to which the Gaussians' scales are clipped.
        unit: scales are divided by it first.
    """

    segment: str = "segment"
    column: int | None = None
    scales: tuple[float, float] = (0.0, 1.5)
    unit: float = 1.0


LAYOUTS = {
    "generic": Layout(scales=(1e-4, 1.0)),
    "scannet": Layout("segment20"),
    "scannet200": Layout("segment200"),
    "scannetpp": Layout(column=0),
    "matterport": Layout(),
    "matterport160": Layout("segment_nyu_160"),
    "holicity": Layout(scales=(1e-4, 1.0)),
    "kitti360": Layout(unit=10.0),
}


def _floats(array: Array, width: int) -> NDArray[np.float32]:
    """f32 [N, width] of finite numbers."""
    if array.shape[1:] != (width,) and not (width == 1 and array.ndim == 1):
        turned = "; it looks transposed" if array.shape == (width, *array.shape[1:]) else ""
        raise DataError(f"shape {list(array.shape)}, expected [N, {width}]{turned}")
    if array.dtype.kind == "b":
        raise DataError("truth values, expected numbers")
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(array.reshape(-1, width), dtype=np.float32)
    wrong = int((~np.isfinite(values)).any(axis=1).sum())
    if wrong:
        raise DataError(f"{wrong} of {len(values)} rows hold NaN or infinity")
    return values


def _coord(array: Array, layout: Layout, notes: list[str]) -> Array:
    values = _floats(array, 3)
    if np.abs(values).max() > FAR:
        notes.append(
            f"coordinates reach {np.abs(values).max():.3g} m, where float32 has lost the detail of "
            f"a voxel: subtract an origin in float64 before writing them"
        )
    return values


def _color(array: Array, layout: Layout, notes: list[str]) -> Array:
    values = _floats(array, 3)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 255:
        raise DataError(f"{low:.3g}..{high:.3g}, expected 0..255 (0.5 + 0.2821 f_dc, times 255)")
    if array.dtype.kind == "f" and 0 < high <= 1:
        notes.append(f"colours {low:.3g}..{high:.3g} were taken as 0..1 and multiplied by 255")
        return values * 255
    return values


def _opacity(array: Array, layout: Layout, notes: list[str]) -> Array:
    values = _floats(array, 1)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        raise DataError(f"{low:.3g}..{high:.3g}, expected 0..1: are these logits? apply a sigmoid")
    return values


def _scale(array: Array, layout: Layout, notes: list[str]) -> Array:
    values = _floats(array, 3)
    if values.min() < 0:
        raise DataError(
            f"{values.min():.3g}..{values.max():.3g}, expected metres above 0: "
            f"are these logarithms? apply exp"
        )
    return np.clip(values / layout.unit, *layout.scales).astype(np.float32)


def _quat(array: Array, layout: Layout, notes: list[str]) -> Array:
    values = _floats(array, 4)
    norm = np.linalg.norm(values, axis=1, keepdims=True)
    zero = int((norm == 0).sum())
    if zero:
        raise DataError(f"{zero} of {len(values)} rows are zero: not a rotation (w, x, y, z)")
    other = int((np.abs(norm - 1) > 1e-3).sum())
    if other:
        notes.append(f"{other} of {len(values)} quaternions were brought to length 1")
        values = values / norm
    negative = values[:, 0] < 0
    if negative.any():
        notes.append(f"{int(negative.sum())} of {len(values)} quaternions were negated: w < 0")
        values = np.where(negative[:, None], -values, values)
    return values


def _normal(array: Array, layout: Layout, notes: list[str]) -> Array:
    return _floats(array, 3)


def _labels(array: Array, layout: Layout, notes: list[str]) -> Array:
    if array.ndim == 2 and layout.column is not None and layout.column < array.shape[1]:
        array = array[:, layout.column]
    elif array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise DataError(f"shape {list(array.shape)}, expected one label per row")
    if array.dtype.kind not in "iu":
        raise DataError(f"{array.dtype}, expected whole numbers; -1 where there is no label")
    if array.min() < -1 or array.max() >= 2**31:
        raise DataError(f"{array.min()}..{array.max()}, expected class numbers, or -1 for none")
    return array.astype(np.int32)


def _instance(array: Array, layout: Layout, notes: list[str]) -> Array:
    return _labels(array, Layout(), notes)


def _features(array: Array, layout: Layout, notes: list[str]) -> Array:
    if array.ndim != 2 or array.dtype.kind != "f":
        raise DataError(f"{array.dtype} {list(array.shape)}, expected float16 [N, width]")
    return array


def _mask(array: Array, layout: Layout, notes: list[str]) -> Array:
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or not ((array == 0) | (array == 1)).all():
        raise DataError(f"{array.dtype} {list(array.shape)}, expected [N] of 0 and 1")
    return array.astype(bool)


MEANING: dict[str, Callable[[Array, Layout, list[str]], Array]] = {
    "coord": _coord,
    "color": _color,
    "opacity": _opacity,
    "scale": _scale,
    "quat": _quat,
    "normal": _normal,
    "segment": _labels,
    "instance": _instance,
    "lang_feat": _features,
    "valid_feat_mask": _mask,
    "pc_coord": _coord,
    "pc_segment": _labels,
}
