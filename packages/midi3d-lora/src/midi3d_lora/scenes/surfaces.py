"""Points on the surfaces of a scene's instances: `surface.npy`, or `surface_<label>.npy` each.

    parts = open_parts(folder, labels, notes)         # which points belong to which labels
    frame = check_parts(parts, normalize=False, notes=notes)
    surface = draw_surface(parts[0], frame, 20480, np.random.default_rng(0), notes)

Columns of an [N, C] array:

    3   x y z; normals are estimated
    4   x y z and the instance's label, if the values are the labels of seg.png; else ignored
    6   x y z and the normal
    7   x y z, the normal and the instance's label

[K, N, 3] and [K, N, 6] hold one slice for each label, in ascending order. The dictionary of
`surface_points` and `surface_normals` that is published for 3D-FRONT is read, too.

What was repaired is said in `notes`, each as "what: how much".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_core.errors import DataError, listing, one_line
from lora_core.npy_file import holds_objects, read_array
from midi3d_lora.meshes.normals import estimate_normals
from midi3d_lora.scenes.array_pickle import read_surface_dict
from midi3d_lora.scenes.scene_frame import BOUND, SceneFrame, fit_frame

FEWEST = 64  # points of an instance
ENOUGH = 8192  # the encoder draws 4 * 2048 points
AT_ONCE = 2**20  # rows that are checked at a time
ACCEPTED = "expected [N, 3], [N, 4], [N, 6] or [N, 7], or one slice per label [K, N, 3 or 6]"
LABELLED = re.compile(r"surface_(\d+)\.npy")


@dataclass(frozen=True)
class Part:
    """Points in a file that belong to one instance, or to several that nobody told apart.

    Attributes:
        labels: of seg.png; more than one: the points are those of their union.
        values: [N, 3] xyz or [N, 6] xyz and normals, as on disk and read when used.
        rows: int64, those of `values` that count; None: all.
        name: of the file, for messages.
    """

    labels: tuple[int, ...]
    values: NDArray[Any]
    rows: NDArray[np.int64] | None
    name: str

    def __len__(self) -> int:
        return len(self.values) if self.rows is None else len(self.rows)


@dataclass(frozen=True)
class Surface:
    """f32 `points` [N, 3] in the scene's frame, and unit `normals` [N, 3]."""

    points: NDArray[np.float32]
    normals: NDArray[np.float32]

    def joined(self) -> NDArray[np.float32]:
        """[N, 6], as the encoder takes them."""
        return np.concatenate([self.points, self.normals], axis=1)


def surface_files(folder: Path) -> list[Path]:
    """`surface.npy` and `surface_<label>.npy` in a scene's folder, those by ascending label."""
    whole = folder / "surface.npy"
    numbered = [path for path in folder.glob("surface_*.npy") if LABELLED.fullmatch(path.name)]
    numbered.sort(key=lambda path: (_label_of(path), path.name))
    return [*([whole] if whole.exists() else []), *numbered]


def _label_of(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


# -- which points belong to which labels -----------------------------------------------------------


def open_parts(folder: Path, labels: Sequence[int], notes: list[str]) -> list[Part]:
    """The parts of a scene, ordered by label; every label is in exactly one.

    Args:
        labels: of the instances in seg.png, ascending.

    Raises:
        DataError: no file, one that is no array of points, or points that do not match the labels.
    """
    files = surface_files(folder)
    if not files:
        raise DataError(f"{one_line(folder)}: misses surface.npy")
    if files[0].name != "surface.npy":
        return _parts_of_files(folder, files, labels, notes)
    if len(files) > 1:
        others = ", ".join(path.name for path in files[1:4])
        raise DataError(f"{one_line(folder)}: holds both surface.npy and {others}: remove one kind")
    name, array = one_line(files[0]), _mapped(files[0])
    _check_shape(array, name)
    if array.ndim == 3:
        if len(array) != len(labels):
            raise DataError(
                f"{name}: {len(array)} slices, but seg.png has the labels {_some(labels)}"
            )
        return [Part((labels[k],), array[k], None, name) for k in range(len(array))]
    if array.shape[1] in (4, 7):
        return _parts_by_column(array, name, labels, notes)
    return [_unassigned(array, name, labels, notes)]


def _mapped(path: Path) -> NDArray[Any]:
    try:
        if holds_objects(path):
            return read_surface_dict(path)
        return read_array(path, mapped=True, kinds="iuf")
    except OSError as error:
        raise DataError(f"{one_line(path)}: cannot be read: {error.strerror}") from None


def _check_shape(array: NDArray[Any], name: str) -> None:
    shape = list(array.shape)
    known = {2: (3, 4, 6, 7), 3: (3, 6)}.get(array.ndim, ())
    if array.ndim in (2, 3) and shape[-1] in known and shape[-2] > 0:
        return
    turned = array.ndim == 2 and shape[0] in (3, 4, 6, 7) and shape[1] >= FEWEST
    reason = "; it looks transposed: save its .T" if turned else ""
    empty = "holds no points: " if 0 in shape else ""
    raise DataError(f"{name}: {empty}shape {shape}, {ACCEPTED}{reason}")


def _parts_of_files(
    folder: Path, files: Sequence[Path], labels: Sequence[int], notes: list[str]
) -> list[Part]:
    found = [_label_of(path) for path in files]
    problem = _mismatch(found, labels, "the surface_<label>.npy files have")
    if problem:
        raise DataError(f"{one_line(folder)}: {problem}")
    parts, problems = [], []
    for label, path in zip(found, files, strict=True):
        try:
            array = _mapped(path)
            _check_shape(array, one_line(path))
            if array.ndim == 3:
                raise DataError(
                    f"{one_line(path)}: shape {list(array.shape)}, expected [N, 3 or 6]"
                )
        except DataError as error:
            problems.append(str(error))
            continue
        parts.append(Part((label,), _without_label(array, notes), None, one_line(path)))
    if problems:
        raise DataError(listing(problems))
    return parts


def _without_label(array: NDArray[Any], notes: list[str]) -> NDArray[Any]:
    width = array.shape[1]
    if width in (4, 7):
        notes.append(f"column {width} of surface files was ignored: it is no label here")
        return array[:, : width - 1]
    return array


def _mismatch(found: Sequence[int], labels: Sequence[int], what: str) -> str:
    """What is wrong if `found` are not the labels of seg.png, or ""."""
    if sorted(found) == sorted(labels):
        return ""
    text = f"{what} the labels {_some(found)}, but seg.png has {_some(labels)}"
    for shift, word in ((1, "above"), (-1, "below")):
        if sorted(label + shift for label in found) == sorted(labels):
            text += f": off by one? seg.png's are one {word} them (0 is its background)"
    return text


def _some(labels: Sequence[int], limit: int = 20) -> str:
    shown = ", ".join(str(label) for label in labels[:limit])
    return f"{shown}, ... ({len(labels)})" if len(labels) > limit else shown or "none"


def _parts_by_column(
    array: NDArray[Any], name: str, labels: Sequence[int], notes: list[str]
) -> list[Part]:
    """Parts of [N, 4 or 7]: the last column says to which instance a point belongs."""
    width = array.shape[1] - 1
    column = np.array(array[:, width])
    found = _whole_values(column)
    problem = _mismatch(found, labels, f"column {width + 1} has") if found else "fractions"
    if not problem:
        values = array[:, :width]
        return [Part((n,), values, np.flatnonzero(column == n), name) for n in labels]
    if width == 6 and not found:
        raise DataError(f"{name}: column 7 is no label: expected whole numbers, those of seg.png")
    if width == 6 or (len(found) > 1 and "off by one" in problem):
        raise DataError(f"{name}: {problem}")
    notes.append(
        "column 4 of surface.npy was ignored: it can be no normal, which has three components, and "
        f"does not hold the labels of seg.png: {problem}"
    )
    return [_unassigned(array[:, :3], name, labels, notes)]


def _whole_values(column: NDArray[Any], most: int = 256) -> list[int]:
    """The distinct values if they are at most 256 whole numbers, else []."""
    distinct = np.unique(column)
    if len(distinct) > most or not np.isfinite(distinct).all() or (distinct % 1 != 0).any():
        return []
    return [int(value) for value in distinct]


def _unassigned(array: NDArray[Any], name: str, labels: Sequence[int], notes: list[str]) -> Part:
    if len(labels) > 1:
        notes.append(
            "one cloud for several instances, so that all become one object, which is almost never "
            f"wanted (add the label as column 7, or a file per instance): {len(labels)} instances"
        )
    return Part(tuple(labels), array, None, name)


# -- checking all points ---------------------------------------------------------------------------


def check_parts(parts: Sequence[Part], normalize: bool, notes: list[str]) -> SceneFrame | None:
    """Look at every point of a scene, a million at a time.

    Args:
        normalize: bring points beyond [-1.05, 1.05] into the frame, all parts by one transform.

    Returns:
        The transform; None: the points are in the scene's frame.

    Raises:
        DataError: too few points, NaN or infinity, no extent, or outside of the frame; all problems
            together.
    """
    problems: list[str] = []
    boxes = [box for part in parts if (box := _checked_box(part, problems, notes)) is not None]
    if problems:
        raise DataError(listing(problems))
    low = np.min([box[0] for box in boxes], axis=0)
    high = np.max([box[1] for box in boxes], axis=0)
    if max(np.abs(low).max(), np.abs(high).max()) <= BOUND:
        return None
    ranges = zip("xyz", low, high, strict=True)
    extent = ", ".join(f"{axis} {least:.4g}..{most:.4g}" for axis, least, most in ranges)
    if not normalize:
        raise DataError(
            f"{parts[0].name}: points outside of [-1, 1]: {extent}; add --normalize to bring the "
            "scene into it as a whole"
        )
    notes.append(f"scenes brought into [-1, 1] as a whole: {extent}")
    return fit_frame(low, high)


def _checked_box(
    part: Part, problems: list[str], notes: list[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """(low, high) corner of a part's points."""
    where = part.name if part.rows is None else f"{part.name}: label {part.labels[0]}"
    if len(part) < FEWEST:
        problems.append(f"{where}: {len(part)} points, expected at least {FEWEST}")
        return None
    low, high, wrong, flat = np.full(3, np.inf), np.full(3, -np.inf), 0, 0
    for block in _blocks(part):
        good = np.isfinite(block).all(axis=1)
        wrong += int((~good).sum())
        if good.any():
            low = np.minimum(low, block[good, :3].min(axis=0))
            high = np.maximum(high, block[good, :3].max(axis=0))
        if block.shape[1] == 6:
            flat += int(((block[:, 3:] ** 2).sum(axis=1) < 1e-12).sum())
    if wrong:
        problems.append(f"{where}: {wrong} of {len(part)} rows hold NaN or infinity")
        return None
    if (high - low).max() <= 1e-6 * max(1.0, np.abs(high).max()):
        problems.append(f"{where}: all points are the same, {_point(low)}: no surface")
        return None
    if flat:
        notes.append(f"normals of length zero were estimated anew: {flat} of {len(part)}")
    if part.values.shape[1] == 3:
        notes.append("surfaces without normals: those were estimated")
    if len(part) < ENOUGH:
        notes.append(f"surfaces of fewer than {ENOUGH} points, of which some are repeated")
    return low, high


def _blocks(part: Part) -> Iterator[NDArray[np.float64]]:
    for begin in range(0, len(part), AT_ONCE):
        rows = slice(begin, begin + AT_ONCE)
        block = part.values[rows] if part.rows is None else part.values[part.rows[rows]]
        yield np.asarray(block, np.float64)


def _point(values: NDArray[np.float64]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


# -- drawing ---------------------------------------------------------------------------------------


def draw_surface(
    part: Part, frame: SceneFrame | None, num_points: int, rng: np.random.Generator
) -> Surface:
    """Draw exactly `num_points` of a part that `check_parts` has passed.

    More points are drawn without replacement. Of fewer, all are taken and the rest drawn among
    them: zeros in their place would be a point at the origin that farthest point sampling picks.

    Raises:
        DataError: points without normals of which almost all are the same.
    """
    rows = np.arange(len(part))
    if len(part) > num_points:
        rows = np.sort(rng.choice(len(part), num_points, replace=False, shuffle=False))
    chosen = rows if part.rows is None else part.rows[rows]
    values = np.asarray(part.values[chosen], np.float64)
    points = values[:, :3] if frame is None else frame.apply(values[:, :3])
    try:
        normals = _unit_normals(points, values[:, 3:])
    except ValueError as error:
        raise DataError(f"{part.name}: no normals can be estimated: {error}") from None
    if len(points) < num_points:
        more = rng.integers(len(points), size=num_points - len(points))
        repeated = np.concatenate([np.arange(len(points)), more])
        points, normals = points[repeated], normals[repeated]
    return Surface(points.astype(np.float32), normals.astype(np.float32))


def _unit_normals(points: NDArray[np.float64], given: NDArray[np.float64]) -> NDArray[Any]:
    """Normals of length 1: those given, or estimated where they are missing or zero."""
    if not given.shape[1]:
        return estimate_normals(points)
    length = np.linalg.norm(given, axis=1, keepdims=True)
    zero = length[:, 0] < 1e-6
    normals = given / np.where(zero[:, None], 1.0, length)
    if zero.any():
        normals[zero] = estimate_normals(points)[zero]
    return normals
