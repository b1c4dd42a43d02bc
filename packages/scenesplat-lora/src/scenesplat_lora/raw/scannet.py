"""ScanNet as it is distributed, to labelled clouds of the 20 benchmark classes.

    scans/scene0000_00/scene0000_00_vh_clean_2.labels.ply          vertices with nyu40 labels
                       scene0000_00_vh_clean_2.0.010000.segs.json  segment of every vertex
                       scene0000_00.aggregation.json               objects
    scans_test/scene0707_00/scene0707_00_vh_clean_2.ply            without labels

The vertices of `_vh_clean_2.ply` are those of `.labels.ply`. Source: the data set's description at
github.com/ScanNet/ScanNet; the classes are those of its semantic benchmark (labelids.txt).
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_core.errors import DataError, one_line
from scenesplat_lora.raw.scans import (
    Cloud,
    RawDataset,
    Scan,
    coordinates,
    instances,
    read_groups,
    read_segments,
)
from scenesplat_lora.scenes.ply import read_vertices

# nyu40 numbers of wall, floor, cabinet, bed, chair, sofa, table, door, window, bookshelf, picture,
# counter, desk, curtain, refrigerator, shower curtain, toilet, sink, bathtub, otherfurniture.
NYU40_OF_20 = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 24, 28, 33, 34, 36, 39)
NAME = re.compile(r"scene\d{4}_\d{2}")


def scannet(source: Path) -> RawDataset:
    """The scans below the data set's folder, or in `scans` itself."""
    folders = [source, source / "scans", source / "scans_test"]
    found = (e for f in folders if f.is_dir() for e in f.iterdir() if NAME.fullmatch(e.name))
    scans = {folder.name: _scan(folder) for folder in found if folder.is_dir()}
    return RawDataset(scans, read, {}, {})


def _scan(folder: Path) -> Scan:
    name = folder.name
    return Scan(
        name,
        {
            "labels": folder / f"{name}_vh_clean_2.labels.ply",
            "segments": folder / f"{name}_vh_clean_2.0.010000.segs.json",
            "objects": folder / f"{name}.aggregation.json",
        },
    )


def read(scan: Scan) -> Cloud | None:
    """The vertices of a scan with labels 0 ... 19; None without a file of labels.

    Raises:
        DataError: a file that cannot be used.
    """
    path = scan.file("labels")
    if path is None:
        return None
    coord = coordinates(path)
    rows = read_vertices(path)
    if "label" not in (rows.dtype.names or ()):
        raise DataError(f"{one_line(path)}: its vertices have no property `label`")
    segment = classes_of(rows["label"].astype(np.int64), NYU40_OF_20)
    segments, objects = scan.file("segments"), scan.file("objects")
    if segments is None or objects is None:
        return Cloud(coord, segment, None)
    of_vertex = read_segments(segments, len(coord), "vertices")
    return Cloud(coord, segment, instances(of_vertex, read_groups(objects)))


def classes_of(labels: NDArray[np.integer], numbers: tuple[int, ...]) -> NDArray[np.int32]:
    """Place of every label in `numbers`, i32 [P]; -1: not among them."""
    known = np.array(numbers)
    order = np.argsort(known)
    place = order[np.searchsorted(known[order], labels).clip(max=len(known) - 1)]
    return np.where(known[place] == labels, place, -1).astype(np.int32)
