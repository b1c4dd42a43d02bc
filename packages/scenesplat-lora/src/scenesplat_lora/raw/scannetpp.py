"""ScanNet++ as it is distributed, to labelled clouds of a list of classes.

    data/036bce3393/scans/mesh_aligned_0.05.ply    mesh
                          segments.json            segment of every vertex
                          segments_anno.json       objects
    metadata/semantic_benchmark/top100.txt         classes, one per line
                                map_benchmark.csv  columns class, semantic_map_to

A vertex may belong to several objects. Column 0 is the class of the smallest of them, the next two
columns those of the next larger, -1 where there is none: the labels of the semantic benchmark,
which counts an object by its vertices. (The official program looks at the first three objects of a
vertex; here they are its three smallest.) Source: the data set's documentation and toolkit at
github.com/scannetpp/scannetpp.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_core.errors import DataError, listing, one_line
from scenesplat_lora.raw.scans import (
    Cloud,
    Group,
    Indices,
    RawDataset,
    Scan,
    coordinates,
    digest,
    members,
    read_groups,
    read_lines,
    read_segments,
    read_table,
)

MOST_LABELS = 3  # of a vertex, as in the benchmark's files
BENCHMARK = Path("metadata") / "semantic_benchmark"
MAP = ("class", "semantic_map_to")  # columns of map_benchmark.csv


def scannetpp(source: Path, classes: Path | None, label_map: Path | None) -> RawDataset:
    """The scans below the data set's folder, or in `data` itself.

    Args:
        classes: list of classes; None: that of the semantic benchmark beside the data.
        label_map: which class annotated names belong to; None: that beside the data if it is
            there and `classes` is None, else names count as they are.

    Raises:
        DataError: no such list, or one with repeated names.
    """
    if classes is None:
        root = next((r for r in (source, source.parent) if (r / BENCHMARK).is_dir()), source)
        classes = root / BENCHMARK / "top100.txt"
        label_map = label_map or root / BENCHMARK / "map_benchmark.csv"
        if not classes.exists():
            raise DataError(f"{one_line(classes.absolute())}: no such file: give --classes")
        label_map = label_map if label_map.exists() else None
    names = read_lines(classes)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not names:
        what = f"{', '.join(twice[:5])} more than once" if twice else "no classes"
        raise DataError(f"{one_line(classes)}: {what}")
    number = class_numbers(names, read_table(label_map, ",", MAP) if label_map else [])
    settings = {"classes": names, "label_map": digest(sorted(number.items()))}
    return RawDataset(_scans(source), partial(read, number=number), settings, {})


def class_numbers(names: list[str], label_map: list[tuple[str, str]]) -> dict[str, int]:
    """The class number of every annotated name.

    In the map, "None" leaves a name out, and nothing keeps it as it is.
    """
    number = {name: place for place, name in enumerate(names)}
    found = dict(number)
    for name, target in label_map:
        place = number.get(target or name)
        if target == "None" or place is None:
            found.pop(name, None)
        else:
            found[name] = place
    return found


def _scans(source: Path) -> dict[str, Scan]:
    folders = [f for f in (source / "data", source) if f.is_dir()]
    found = {e.name: e / "scans" for f in folders for e in f.iterdir() if (e / "scans").is_dir()}
    return {name: Scan(name, _files(folder)) for name, folder in found.items()}


def _files(folder: Path) -> dict[str, Path]:
    return {
        "mesh": folder / "mesh_aligned_0.05.ply",
        "segments": folder / "segments.json",
        "objects": folder / "segments_anno.json",
    }


def read(scan: Scan, number: dict[str, int]) -> Cloud | None:
    """The vertices of a scan with labels [P, 3]; None without an annotation.

    Raises:
        DataError: a file that cannot be used, or that is missing beside the annotation.
    """
    if scan.file("objects") is None:
        return None
    missing = [path.name for path in scan.files.values() if not path.exists()]
    if missing:
        folder = one_line(scan.files["objects"].parent)
        raise DataError(listing([f"{folder}: misses {name}" for name in missing]))
    coord = coordinates(scan.files["mesh"])
    of_vertex = read_segments(scan.files["segments"], len(coord), "vertices")
    groups = read_groups(scan.files["objects"])
    return Cloud(coord, *smallest_objects(of_vertex, groups, number))


def smallest_objects(
    segments: Indices, groups: list[Group], number: dict[str, int]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Classes i32 [P, 3] of the smallest known objects of every vertex, and the smallest, [P]."""
    rows = list(members(segments, groups))
    known = [place for place, group in enumerate(groups) if group.label in number]
    labels = np.full((len(segments), MOST_LABELS), -1, np.int32)
    objects = np.full(len(segments), -1, np.int32)
    used = np.zeros(len(segments), np.int64)
    for place in sorted(known, key=lambda place: len(rows[place])):
        free = rows[place][used[rows[place]] < MOST_LABELS]
        labels[free, used[free]] = number[groups[place].label]
        objects[free[used[free] == 0]] = place
        used[free] += 1
    return labels, objects
