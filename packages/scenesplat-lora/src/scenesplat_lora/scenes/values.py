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
from scenesplat_lora.scenes.scene import highest, lowest

Array = NDArray[Any]
FAR = 1e4  # metres; float32 has steps of 1 mm there, a twentieth of a voxel
BEYOND = 1e15  # metres; whole metres are no longer exact in float64
HUGE = 0.1  # share of Gaussians whose scales may be cut without a word


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
    finite = np.isfinite(values)
    if not finite.all():
        wrong = int((~finite).any(axis=1).sum())
        raise DataError(f"{wrong} of {len(values)} rows hold NaN or infinity")
    return values


def recentred(arrays: dict[str, Array], notes: list[str]) -> dict[str, Array]:
    """The arrays with `coord` and `pc_coord` counted from the scene's middle if it is far away.

    Maps (UTM) have coordinates of 10^6 metres, which float32 rounds to 6 cm. Whole metres are
    subtracted in float64, so that nothing is lost that the file has; both clouds move alike.
    """
    coord = arrays.get("coord")
    if coord is None or coord.shape[1:] != (3,) or coord.dtype.kind not in "iuf" or not len(coord):
        return arrays
    box = np.array([lowest(coord), highest(coord)], dtype=np.float64)
    if not FAR < np.abs(box).max() < BEYOND:  # not with NaN either
        return arrays
    origin = np.round(box.mean(axis=0))
    step = 0.0 if coord.dtype.kind != "f" else np.spacing(np.abs(box).max().astype(coord.dtype))
    rounded = f"; {coord.dtype} has rounded them to {step:.2g} m already" if step > 1e-3 else ""
    notes.append(
        "coordinates far from the origin, as maps have them, were moved to it: by "
        f"{', '.join(f'{-metres:.0f}' for metres in origin)} m{rounded}"
    )
    moved = {name: arrays[name] for name in ("coord", "pc_coord") if name in arrays}
    fitting = {n: a for n, a in moved.items() if a.shape[1:] == (3,) and a.dtype.kind in "iuf"}
    return arrays | {name: a.astype(np.float64) - origin for name, a in fitting.items()}


def _coord(array: Array, layout: Layout, notes: list[str]) -> Array:
    return _floats(array, 3)


def _color(array: Array, layout: Layout, notes: list[str]) -> Array:
    values = _floats(array, 3)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 255:
        raise DataError(f"{low:.3g}..{high:.3g}, expected 0..255 (0.5 + 0.2821 f_dc, times 255)")
    if array.dtype.kind == "f" and 0 < high <= 1:
        notes.append(f"colours were taken as 0..1 and multiplied by 255: {low:.3g}..{high:.3g}")
        return values * 255
    return values


def _opacity(array: Array, layout: Layout, notes: list[str]) -> Array:
    values = _floats(array, 1)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        hint = "are these logits? apply a sigmoid" if low < 0 or high <= 30 else "divide by 255"
        raise DataError(f"{low:.3g}..{high:.3g}, expected 0..1: {hint}")
    return values


def _scale(array: Array, layout: Layout, notes: list[str]) -> Array:
    values = _floats(array, 3)
    if values.min() < 0:
        raise DataError(
            f"{values.min():.3g}..{values.max():.3g}, expected metres above 0: "
            f"are these logarithms? apply exp"
        )
    metres = values / layout.unit
    large = metres > layout.scales[1]
    cut = int(large.any(axis=1).sum()) if large.any() else 0
    if cut > HUGE * len(metres):
        notes.append(
            f"scales above {layout.scales[1]:g} m were cut, are they metres?: {cut} of "
            f"{len(metres)} rows, up to {metres.max():.3g}"
        )
    return np.clip(metres, *layout.scales).astype(np.float32)


def _quat(array: Array, layout: Layout, notes: list[str]) -> Array:
    values = _floats(array, 4)
    w, x, y, z = values.astype(np.float64).T  # six times as fast as np.linalg.norm
    norm = np.sqrt(w * w + x * x + y * y + z * z)[:, None]
    zero = int((norm == 0).sum())
    if zero:
        raise DataError(f"{zero} of {len(values)} rows are zero: not a rotation (w, x, y, z)")
    other = int((np.abs(norm - 1) > 1e-3).sum())
    if other:
        notes.append(f"quaternions were brought to length 1: {other} of {len(values)}")
        values = (values / norm).astype(np.float32)
    negative = values[:, 0] < 0
    if negative.any():
        notes.append(f"quaternions with w < 0 were negated: {int(negative.sum())} of {len(values)}")
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
    # torch has no wider floating point numbers than float64.
    if array.ndim != 2 or array.dtype.kind != "f" or array.dtype.itemsize > 8:
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
