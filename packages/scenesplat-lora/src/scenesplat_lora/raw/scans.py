"""Scans as data sets distribute them: a mesh, segments of it, and what people called them.

ScanNet, ScanNet++ and Matterport3D share one form of annotation. `segIndices` gives the segment of
every vertex (of every face in Matterport3D); `segGroups` lists objects with a `label` and the
`segments` that they consist of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_core.data_file import is_label, open_regular, read_json
from lora_core.errors import DataError, one_line
from scenesplat_lora.scenes.ply import read_vertices

Indices = NDArray[np.integer]
MAX_TABLE = 100_000_000  # bytes of a list of scenes or classes


class Cloud(NamedTuple):
    """The labelled vertices of a mesh.

    Attributes:
        coord: f32 [P, 3], metres, z up.
        segment: i32 [P], or [P, k] with the class that counts in column 0; -1: none.
        instance: i32 [P], -1: none; None where it is not known.
    """

    coord: NDArray[np.float32]
    segment: NDArray[np.int32]
    instance: NDArray[np.int32] | None


class Scan(NamedTuple):
    """One scan on disk: its name, and the files that are read of it, some of which may lack."""

    name: str
    files: Mapping[str, Path]

    def file(self, kind: str) -> Path | None:
        """A file if it is there."""
        path = self.files[kind]
        return path if path.exists() else None


@dataclass(frozen=True)
class RawDataset:
    """The scans of a data set.

    Attributes:
        scans: by their names. groups: names that stand for several scans, as a house for its rooms.
        read: the labelled cloud of a scan; None for one without annotation.
        settings: all that labels depend on besides the files of a scan.
    """

    scans: Mapping[str, Scan]
    read: Callable[[Scan], Cloud | None]
    settings: Mapping[str, Any]
    groups: Mapping[str, list[str]]


class Group(NamedTuple):
    """An object: what people called it, and its segments."""

    label: str
    segments: Indices


def coordinates(path: Path) -> NDArray[np.float32]:
    """Vertices of a mesh, f32 [P, 3]; DataError if there are none or they are not finite."""
    rows = read_vertices(path)
    missing = [axis for axis in "xyz" if axis not in (rows.dtype.names or ())]
    if missing or not len(rows):
        what = f"vertices without {', '.join(missing)}" if missing else "no vertices"
        raise DataError(f"{one_line(path)}: {what}")
    found = np.stack([rows[axis].astype(np.float32) for axis in "xyz"], axis=1)
    wrong = int((~np.isfinite(found)).any(axis=1).sum())
    if wrong:
        raise DataError(f"{one_line(path)}: {wrong} vertices hold NaN or infinity")
    return found


# -- annotation ------------------------------------------------------------------------------------


def read_segments(path: Path, count: int, what: str) -> Indices:
    """`segIndices`, [count]: the segment of every vertex or face (`what`)."""
    content = read_json(path)
    values = content.get("segIndices") if isinstance(content, dict) else None
    if not isinstance(values, list):
        raise DataError(f"{one_line(path)}: expected a list `segIndices`")
    if len(values) != count:
        raise DataError(
            f"{one_line(path)}: segIndices has {len(values)} entries, the mesh {count} {what}: "
            "they are of different meshes"
        )
    return _whole_numbers(path, "segIndices", values)


def read_groups(path: Path) -> list[Group]:
    """`segGroups`: the objects of a scan."""
    content = read_json(path)
    groups = content.get("segGroups") if isinstance(content, dict) else None
    if not isinstance(groups, list):
        raise DataError(f"{one_line(path)}: expected a list `segGroups`")
    return [_group(path, number, group) for number, group in enumerate(groups)]


def _group(path: Path, number: int, group: object) -> Group:
    where = f"segGroups[{number}]"
    if not (isinstance(group, dict) and is_label(group.get("label"))):
        raise DataError(f"{one_line(path)}: {where}: expected an object with a text `label`")
    segments = group.get("segments")
    if not isinstance(segments, list):
        raise DataError(f"{one_line(path)}: {where}: expected a list `segments`")
    return Group(group["label"], _whole_numbers(path, f"{where}.segments", segments))


def _whole_numbers(path: Path, where: str, values: list[Any]) -> Indices:
    try:
        found = np.array(values, np.int64 if not values else None)
    except (ValueError, OverflowError):
        found = np.array(None)
    if found.dtype.kind not in "iu" or found.ndim != 1:
        raise DataError(f"{one_line(path)}: {where}: expected whole numbers")
    return found


def members(segments: Indices, groups: list[Group]) -> Iterator[Indices]:
    """Rows (vertices or faces) of every group, in the order of groups.

    Args:
        segments: [P], the segment of every row.
    """
    order = np.argsort(segments, kind="stable")
    ordered = segments[order]
    for group in groups:
        wanted = np.unique(group.segments)
        left = np.searchsorted(ordered, wanted, "left")
        length = np.searchsorted(ordered, wanted, "right") - left
        inside = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        yield order[np.repeat(left, length) + inside]


def instances(segments: Indices, groups: list[Group]) -> NDArray[np.int32]:
    """Number of the object of every row, i32 [P]; -1: of none. Of several the last counts."""
    found = np.full(len(segments), -1, np.int32)
    for number, rows in enumerate(members(segments, groups)):
        found[rows] = number
    return found


# -- lists -----------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without empty ones and space around them.

    Raises:
        DataError: no such file, too large, or no UTF-8 text.
    """
    with open_regular(path) as file:
        data = file.read(MAX_TABLE + 1)
    if len(data) > MAX_TABLE:
        raise DataError(f"{one_line(path)}: more than {MAX_TABLE // 10**6} MB: is it a list?")
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{one_line(path)}: expected UTF-8 text: {error.reason}") from None
    return [line.strip(" \r") for line in lines if line.strip()]


def read_table(path: Path, delimiter: str, columns: tuple[str, str]) -> list[tuple[str, str]]:
    """Two columns of a table with a header line.

    Raises:
        DataError: it lacks a column, or see `read_lines`.
    """
    import csv

    lines = read_lines(path)
    if delimiter == "\t":  # 42" is a size there, no beginning of a quotation
        rows = csv.DictReader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    else:
        rows = csv.DictReader(lines, delimiter=delimiter)
    missing = [name for name in columns if name not in (rows.fieldnames or ())]
    if missing:
        there = ", ".join((rows.fieldnames or ())[:20])
        raise DataError(f"{one_line(path)}: no column {', '.join(missing)}, only {there}")
    first, second = columns
    try:
        return [((row[first] or "").strip(), (row[second] or "").strip()) for row in rows]
    except csv.Error as error:
        raise DataError(f"{one_line(path)}: line {rows.line_num}: {error}") from None


def digest(content: object) -> str:
    """A short name of a table, for records."""
    import hashlib

    return hashlib.blake2b(repr(content).encode("utf-8"), digest_size=16).hexdigest()
